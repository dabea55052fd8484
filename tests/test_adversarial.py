"""Adversarial training: `training_step` calls the stock step twice for one micro-batch, the second time elsewhere."""

import pytest
import torch
from conftest import InOrder, flat, make_model
from transformers import Trainer

from adasam_hf import AdaSAMTrainer

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class FastGradientMethod(InOrder):
    """Moves the word embeddings by their normalized gradient for a second backward pass, and back."""

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        words = self.model.bert.embeddings.word_embeddings.weight
        before = words.detach().clone()
        slope = torch.autograd.grad(self.model(**self._prepare_inputs(inputs)).loss, words)[0]
        words.data.add_(slope / slope.norm())
        super().training_step(model, inputs, *args, **kwargs)
        words.data.copy_(before)
        return loss


def trained(build, base, **more):
    kind = type("Adversarial", (FastGradientMethod, base), {})
    model = make_model("bert", **NO_DROPOUT)
    build(kind, model, optim="sgd", learning_rate=1e-2, **more).train()
    return flat(model)


@pytest.mark.parametrize(
    ("scope", "k"),
    [
        pytest.param(scope, k, marks=pytest.mark.compat("Trainer behaviour", "adversarial training", scope=scope))
        for scope, k in (("microbatch", 1), ("microbatch", 3), ("batch", 1))
    ],
)
def test_both_gradients_reach_the_update(build, scope, k):
    stock = trained(build, Trainer, gradient_accumulation_steps=k)
    tiny = trained(build, AdaSAMTrainer, gradient_accumulation_steps=k, sam_scope=scope, sam_rho=1e-10)
    assert (tiny - stock).abs().max() < 1e-8
    real = trained(build, AdaSAMTrainer, gradient_accumulation_steps=k, sam_scope=scope, sam_rho=0.3)
    assert (real - stock).abs().max() > 1e-5


def test_accumulation_in_scope_batch_is_refused(build):
    with pytest.raises(
        RuntimeError, match=r"takes one micro-batch of an accumulated step twice.*sam_scope='microbatch'"
    ):
        trained(build, AdaSAMTrainer, gradient_accumulation_steps=2, sam_rho=0.05)
