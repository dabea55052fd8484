"""Weights in unusual memory, and optimizers with unusual moments, through the Trainer."""

import pytest
import torch
from conftest import flat, make_model, make_rows
from torch import nn
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from adasam_hf import AdaSAMTrainer, AdaSAMTrainingArguments


def vision_model(layout):
    """A ViT for grey images, whose first convolution was cut out of one for colours."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = ViTForImageClassification(config).double()
    patches = model.vit.embeddings.patch_embeddings
    colours = patches.projection.weight.detach()
    grey = colours[:, :1]
    patches.projection.weight = nn.Parameter(grey if layout == "slice" else grey.clone())
    patches.num_channels = 1
    for module in model.modules():
        if layout == "transposed" and isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().T.contiguous().T)
    return model, colours[:, 1:]


def train(tmp_path, layout, radius, **arguments):
    model, beside = vision_model(layout)
    before = beside.clone()
    generator = torch.Generator().manual_seed(1)
    rows = [
        {"pixel_values": torch.randn(1, 8, 8, generator=generator).double(), "labels": torch.tensor(i % 3)}
        for i in range(16)
    ]
    shared = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        **arguments,
    }
    if radius:
        args = AdaSAMTrainingArguments(**shared, sam_rho=radius)
        AdaSAMTrainer(model, args, train_dataset=rows).train()
    else:
        Trainer(model, TrainingArguments(**shared), train_dataset=rows).train()
    assert torch.equal(before, beside)  # memory beside the slice, which other tensors may hold
    return flat(model)


@pytest.mark.parametrize("layout", ["slice", "transposed"])
@pytest.mark.parametrize("optim", ["adasam", "adamw_torch", "sam", "rmsprop"])
def test_a_layout_makes_no_difference(tmp_path, layout, optim):
    apart = (train(tmp_path, layout, 0.05, optim=optim) - train(tmp_path, "plain", 0.05, optim=optim)).abs().max()
    assert apart < 1e-11
    # The control: a slightly other radius does.
    assert (train(tmp_path, layout, 0.05, optim=optim) - train(tmp_path, layout, 0.06, optim=optim)).abs().max() > 1e-6


def test_a_vanishing_radius_is_the_stock_run(tmp_path):
    stock = train(tmp_path, "slice", 0, optim="adamw_torch")
    assert (train(tmp_path, "slice", 1e-10, optim="adamw_torch") - stock).abs().max() < 1e-8
    assert (train(tmp_path, "slice", 0.05, optim="adamw_torch") - stock).abs().max() > 1e-5


def test_a_fused_optimizer_on_a_slice_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"AdamW with fused=True.*optim='adamw_torch'"):
        train(tmp_path, "slice", 0.05, optim="adamw_torch_fused")
    train(tmp_path, "transposed", 0.05, optim="adamw_torch_fused")


# ---- a first moment that is not one ----


class LowRank(torch.optim.SGD):
    """As GaLore and APOLLO keep it: a moment with fewer rows than the matrix."""

    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["exp_avg"] = p.grad.detach()[:1].clone() if p.dim() > 1 else p.grad.detach().clone()


def low_rank_run(tmp_path, **arguments):
    model = make_model("bert")
    args = AdaSAMTrainingArguments(
        output_dir=str(tmp_path),
        optim="sgd",
        max_steps=3,
        per_device_train_batch_size=4,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **{"sam_rho": 0.1, **arguments},
    )
    before = flat(model)
    optimizer = LowRank(model.parameters(), lr=1e-3)
    trainer = AdaSAMTrainer(model, args, train_dataset=make_rows(12), optimizers=(optimizer, None))
    try:
        trainer.train()
    finally:
        assert torch.isfinite(flat(model)).all()
    assert not torch.equal(before, flat(model))


@pytest.mark.parametrize("arguments", [{"sam_preset": "free"}, {"sam_direction": "momentum"}])
def test_a_low_rank_moment_is_refused(tmp_path, arguments):
    with pytest.raises(RuntimeError, match=r"LowRank keeps its first moment.*sam_direction='gradient'"):
        low_rank_run(tmp_path, **arguments)


def test_a_low_rank_moment_does_not_hinder_the_gradient(tmp_path):
    low_rank_run(tmp_path)


def test_a_low_rank_moment_is_nothing_to_a_stock_run(tmp_path):
    low_rank_run(tmp_path, sam_direction="momentum", sam_rho=0.0)
