from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import make_model, make_rows
from transformers.training_args import OptimizerNames

from adasam_hf import AdaSAMTrainer, AdaSAMTrainingArguments
from adasam_hf.refusals import Obstacle, Setup, refuse_unsupported


def trainer(
    kind=DistributedType.NO, world_size=1, n_gpu=1, fsdp2=False, parallelism=None, loaded=False, split=False, **flags
):
    """What `Setup` reads of a trainer; the hardware is not here."""
    values = {
        "optim": "adasam",
        "sam_rho": 0.05,
        "sam_scope": "batch",
        "sam_sync": True,
        "ddp_static_graph": None,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing_kwargs": None,
        "sam_parameters": "all",
        "resolved_direction": "gradient",
    }
    return SimpleNamespace(
        args=SimpleNamespace(world_size=world_size, n_gpu=n_gpu, **{**values, **flags}),
        accelerator=SimpleNamespace(distributed_type=kind, is_fsdp2=fsdp2, parallelism_config=parallelism),
        is_model_parallel=split,
        is_distributed_loading_by_transformers=loaded,
    )


MANY, FSDP = DistributedType.MULTI_CPU, DistributedType.FSDP
STATIC = {"kind": MANY, "world_size": 2, "ddp_static_graph": True}
REFUSED = {
    "DeepSpeed": ({"kind": DistributedType.DEEPSPEED, "world_size": 2}, "DeepSpeed.*DistributedDataParallel"),
    "FSDP version 1": ({"kind": FSDP, "world_size": 2}, "FSDP version 1: use version 2"),
    "FSDP2": (
        {"kind": FSDP, "world_size": 2, "fsdp2": True, "sam_scope": "microbatch"},
        "FSDP2 and a separate ascent on each process.*sam_scope='batch'",
    ),
    "FSDP2 with `sam_sync=False`": (
        {"kind": FSDP, "world_size": 2, "fsdp2": True, "sam_sync": False},
        "FSDP2 and a separate ascent on each process.*sam_sync=True",
    ),
    "FSDP2 with `sam_parameters`": (
        {"kind": FSDP, "world_size": 2, "fsdp2": True, "sam_parameters": "norm"},
        "FSDP2 and sam_parameters='norm'",
    ),
    "DDP with `ddp_static_graph`": ({**STATIC, "sam_scope": "microbatch"}, "ddp_static_graph"),
    "DDP with `ddp_static_graph` and `sam_sync=False`": ({**STATIC, "sam_sync": False}, "ddp_static_graph"),
    "DDP with `ddp_static_graph` and accumulation": ({**STATIC, "gradient_accumulation_steps": 2}, "ddp_static_graph"),
    "tensor parallelism": (
        {"kind": MANY, "world_size": 2, "parallelism": SimpleNamespace(tp_enabled=True)},
        "tensor parallelism",
    ),
    "context parallelism": (
        {"kind": FSDP, "fsdp2": True, "world_size": 2, "parallelism": SimpleNamespace(cp_enabled=True)},
        "context parallelism",
    ),
    "sequence parallelism": (
        {"kind": MANY, "world_size": 2, "parallelism": SimpleNamespace(sp_enabled=True)},
        "sequence parallelism",
    ),
    "a model sharded by `from_pretrained(distributed_config=…)`": (
        {"kind": MANY, "world_size": 2, "loaded": True},
        "distributed_config",
    ),
    "a model spread over devices (`device_map`)": ({"split": True}, "spread over several devices.*device_map"),
    "`torch.nn.DataParallel`": ({"n_gpu": 2}, "DataParallel.*torchrun"),
    "Megatron-LM": ({"kind": DistributedType.MEGATRON_LM, "world_size": 2}, "MEGATRON_LM"),
    "XLA": ({"kind": DistributedType.XLA, "world_size": 8}, "XLA"),
    "LOMO": ({"optim": OptimizerNames.LOMO}, "lomo"),
    "GaLore and APOLLO along their momentum": (
        {"optim": OptimizerNames.GALORE_ADAMW, "resolved_direction": "momentum"},
        "galore_adamw.*momentum.*shape of its moments differs.*sam_direction='gradient'",
    ),
    "layer-wise optimizers": ({"optim": OptimizerNames.GALORE_ADAMW_LAYERWISE}, "layerwise"),
}


@pytest.mark.parametrize(
    ("case", "problem"),
    [
        pytest.param(
            case,
            problem,
            marks=pytest.mark.compat("Many processes", what, refused=True, scope=case.get("sam_scope")),
            id=what,
        )
        for what, (case, problem) in REFUSED.items()
    ],
)
def test_what_is_not_shown_to_work_is_refused(case, problem):
    with pytest.raises(NotImplementedError, match=rf"(?s)sam_rho=0.05.*{problem}.*or set sam_rho=0"):
        refuse_unsupported(Setup.of_trainer(trainer(**case)))


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"optim": OptimizerNames.GALORE_ADAMW},
        {"optim": "adasam", "resolved_direction": "momentum"},
        {"kind": MANY, "world_size": 2},
        {"kind": MANY, "world_size": 2, "sam_scope": "microbatch", "gradient_accumulation_steps": 2},
        {"kind": FSDP, "world_size": 2, "fsdp2": True, "gradient_accumulation_steps": 2},
        STATIC,
    ],
)
def test_what_is_shown_to_work_is_not_refused(case):
    assert refuse_unsupported(Setup.of_trainer(trainer(**case))) is None


@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_refused_before_training_and_only_if_sharpness_aware(tmp_path, monkeypatch, rho):
    args = AdaSAMTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1, sam_rho=rho, save_strategy="no"
    )
    model = make_model("bert", torch.float32)
    before = model.classifier.weight.detach().clone()
    monkeypatch.setattr("adasam_hf.refusals.obstacle", lambda _: Obstacle("this cluster", "use another"))
    run = AdaSAMTrainer(model=model, args=args, train_dataset=make_rows(4)).train
    if rho:
        with pytest.raises(NotImplementedError, match="this cluster: use another"):
            run()
        assert torch.equal(model.classifier.weight, before)
    else:
        run()
        assert not torch.equal(model.classifier.weight, before)


def test_a_dummy_optimizer_is_refused_and_at_radius_zero_left_alone(tmp_path, monkeypatch):
    """DeepSpeed puts a dummy in place of the optimizer if its own configuration has one."""
    for rho in (0.05, 0.0):
        args = AdaSAMTrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", optim="adamw_torch", sam_rho=rho
        )
        trainer = AdaSAMTrainer(model=make_model("bert", torch.float32), args=args, train_dataset=make_rows(4))
        trainer.accelerator.state.distributed_type = DistributedType.DEEPSPEED
        trainer.optimizer = object()
        if rho:
            with pytest.raises(NotImplementedError, match="DeepSpeed"):
                trainer.create_optimizer()
        else:
            trainer.create_optimizer()
            assert not trainer._sam_running().planner.plan(0, 1).perturbs
        trainer.accelerator.state.distributed_type = DistributedType.NO
