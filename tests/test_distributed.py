from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import make_model, make_rows
from transformers.training_args import OptimizerNames

from adasam_hf import AdaSAMTrainer, AdaSAMTrainingArguments
from adasam_hf.distributed import refuse_unsupported


def trainer(kind=DistributedType.NO, world_size=1, n_gpu=1, optim="adasam", scaler=None, **flags):
    """What `refuse_unsupported` reads of a trainer; the hardware is not here."""
    return SimpleNamespace(
        args=SimpleNamespace(world_size=world_size, n_gpu=n_gpu, optim=optim, sam_rho=0.05),
        accelerator=SimpleNamespace(distributed_type=kind, scaler=scaler),
        is_model_parallel=False,
        **flags,
    )


@pytest.mark.parametrize(
    ("case", "problem"),
    [
        ({"kind": DistributedType.DEEPSPEED, "world_size": 2}, "DeepSpeed"),
        ({"kind": DistributedType.MULTI_GPU, "world_size": 2}, r"2 processes \(MULTI_GPU\)"),
        ({"kind": DistributedType.MULTI_CPU, "world_size": 4}, "4 processes"),
        ({"kind": DistributedType.FSDP, "world_size": 2}, "FSDP"),
        ({"n_gpu": 2}, "DataParallel"),
        ({"is_distributed_loading_by_transformers": True}, "several devices"),
        ({"scaler": object()}, "fp16"),
        ({"optim": OptimizerNames.LOMO}, "lomo"),
        ({"optim": OptimizerNames.GALORE_ADAMW_LAYERWISE}, "layerwise"),
    ],
)
def test_what_is_not_shown_to_work_is_refused(case, problem):
    with pytest.raises(NotImplementedError, match=rf"(?s)sam_rho=0.05.*{problem}.*or set sam_rho=0"):
        refuse_unsupported(trainer(**case))


def test_one_process_on_one_device_is_fine():
    assert refuse_unsupported(trainer()) is None


@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_refused_before_training_and_only_if_sharpness_aware(tmp_path, monkeypatch, rho):
    args = AdaSAMTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1, sam_rho=rho, save_strategy="no"
    )
    model = make_model("bert", torch.float32)
    before = model.classifier.weight.detach().clone()
    monkeypatch.setattr("adasam_hf.distributed._obstacle", lambda _: ("this cluster", "use another"))
    run = AdaSAMTrainer(model=model, args=args, train_dataset=make_rows(4)).train
    if rho:
        with pytest.raises(NotImplementedError, match="this cluster: use another"):
            run()
        assert torch.equal(model.classifier.weight, before)
    else:
        run()
        assert not torch.equal(model.classifier.weight, before)
