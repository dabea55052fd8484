"""What takes part in the benchmark of a step: models, batches of real sentences, and whole optimizer steps."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedModel,
    RobertaConfig,
)

import adasam_hf

from ..glue.data import resolve_path
from ..glue.sentences import read_sentences
from .device import chosen_device
from .settings import FROZEN_MODES, MINILM, MODES, RHO, SIZES

Batch: TypeAlias = dict[str, Tensor]


def build_model(name: str) -> PreTrainedModel:
    """MiniLM from its package, or a BERT or RoBERTa of one of the SIZES with random weights; on the chosen device."""
    torch.manual_seed(0)
    if name == "minilm":
        model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(resolve_path(MINILM), num_labels=2)
        model.to(chosen_device())  # type: ignore[arg-type]  # Transformers' types say less than torch's
        model.train()
        return model
    hidden, layers, heads = SIZES[name]
    kind: type[BertConfig | RobertaConfig] = RobertaConfig if name.startswith("roberta") else BertConfig
    vocabulary = 50265 if kind is RobertaConfig else 5000 if name in ("1m", "4m", "11m") else 30522
    config = kind(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=514,
    )
    with chosen_device():  # which makes random weights much faster than a CPU
        model = AutoModelForSequenceClassification.from_config(config)
    model.train()
    return model


def freeze(model: PreTrainedModel, what: str) -> nn.Module:
    """Leave only a part of `model` trainable: a BERT, or one of its family.

    Frozen are the lower ``half`` of the layers, ``all but the top layer``, ``all but the head`` (the encoder), or, with
    ``lora``, all weights, beside adapters of rank 8 at queries and values of the upper third of the layers.
    """
    base: Any = model.base_model
    layers = base.encoder.layer
    if what == "lora":
        from peft import LoraConfig, get_peft_model

        upper = list(range(len(layers) - len(layers) // 3, len(layers)))
        config = LoraConfig("SEQ_CLS", r=8, target_modules=["query", "value"], layers_to_transform=upper)
        adapted: nn.Module = get_peft_model(model, config)
        return adapted.train()
    count = {"half": len(layers) // 2, "all but the top layer": len(layers) - 1}.get(what)
    for part in [base] if count is None else [base.embeddings, *layers[:count]]:
        part.requires_grad_(False)
    return model


def build_batches(count: int, size: int, vocabulary: int) -> list[Batch]:
    """Rotten Tomatoes' sentences, at most 48 tokens, padded to a multiple of 8."""
    rows = read_sentences()
    tokenizer = AutoTokenizer.from_pretrained(resolve_path(MINILM))
    batches = []
    for i in range(count):
        chosen = rows[i :: len(rows) // size][:size]
        texts = [row["text"] for row in chosen]
        batch = tokenizer(
            texts, truncation=True, max_length=48, padding=True, pad_to_multiple_of=8, return_tensors="pt"
        )
        batch["input_ids"] %= vocabulary
        batch["labels"] = torch.tensor([int(row["label"]) for row in chosen])
        batches.append({name: value.to(chosen_device()) for name, value in batch.items()})
    return batches


@dataclass(frozen=True)
class Contender:
    """One whole optimizer step in two parts: everything up to the final gradient, and the update."""

    passes: Callable[[Batch], object]
    update: Callable[[], object]

    def __call__(self, batch: Batch) -> None:
        self.passes(batch)
        self.update()


def autocast(dtype: str) -> AbstractContextManager[Any]:
    """The context of a forward pass in this precision."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype)
    return nullcontext() if half is None else torch.autocast(chosen_device().type, half)


def backward(model: nn.Module, batch: Batch, dtype: str) -> Tensor:
    """One plain pass. Returns its loss."""
    with autocast(dtype):
        loss: Tensor = model(**batch).loss
    loss.backward()
    return loss


def through_trainer(
    model: nn.Module, dtype: str, arguments: Mapping[str, Any], package: ModuleType = adasam_hf
) -> Contender:
    """An optimizer step through the trainer, as `AdaSAMTrainingArguments(**arguments)` say it."""
    device = chosen_device()
    args = package.AdaSAMTrainingArguments(
        output_dir="runs/benchmark_step",
        use_cpu=device.type == "cpu",
        report_to="none",
        learning_rate=1e-6,
        **arguments,
    )
    trainer = package.AdaSAMTrainer(model, args)
    trainer.current_gradient_accumulation_steps = 1
    optimizer = trainer.create_optimizer()
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0) if dtype == "fp16" else None
    trainer.accelerator.scaler = scaler  # which Accelerate leaves out on a CPU

    def passes(batch: Batch) -> None:
        with autocast(dtype):
            trainer.training_step(model, batch)

    def update() -> None:
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        model.zero_grad()

    return Contender(passes, update)


def for_loop_sam(model: nn.Module, dtype: str) -> Contender:
    """SAM as a loop over parameters, around torch's Adam with AMSGrad."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, amsgrad=True)

    def passes(batch: Batch) -> None:
        backward(model, batch, dtype)
        with torch.no_grad():
            gradients = {p: p.grad for p in model.parameters() if p.grad is not None}
            norm = torch.norm(torch.stack([g.norm() for g in gradients.values()]))
            old = {p: p.data.clone() for p in gradients}
            for p, gradient in gradients.items():
                p.add_(gradient * (RHO / (norm + 1e-12)))
        model.zero_grad()
        backward(model, batch, dtype)
        with torch.no_grad():
            for p, value in old.items():
                p.copy_(value)

    def update() -> None:
        optimizer.step()
        model.zero_grad()

    return Contender(passes, update)


def temperon(model: nn.Module, dtype: str) -> Contender:
    """Temperon, which does both passes and the update in its step."""
    from temperon import Temperon

    adam = torch.optim.Adam(model.parameters(), lr=1e-6, amsgrad=True, fused=True)
    optimizer = Temperon(adam, 10**9, tail_frac=1.0, rho=RHO)

    def whole(batch: Batch) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            return backward(model, batch, dtype)

        optimizer.step(closure)

    return Contender(whole, optimizer.zero_grad)


def pytorch_optimizer_sam(model: nn.Module, dtype: str) -> Contender:
    """pytorch-optimizer's SAM around torch's Adam with AMSGrad."""
    from pytorch_optimizer import SAM

    optimizer = SAM(model.parameters(), torch.optim.Adam, rho=RHO, lr=1e-6, amsgrad=True)

    def whole(batch: Batch) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            return backward(model, batch, dtype)

        backward(model, batch, dtype)
        optimizer.step(closure)

    return Contender(whole, optimizer.zero_grad)


PEER_STEPS: dict[str, Callable[[nn.Module, str], Contender]] = {
    "pytorch-optimizer's SAM": pytorch_optimizer_sam,
    "Temperon": temperon,
    "for-loop SAM": for_loop_sam,
}


def build(name: str, model: nn.Module, dtype: str) -> Contender:
    """The contender of this name, of `settings.MODES` or `settings.PEERS`.

    Raises:
        ModuleNotFoundError: if a peer's package is not installed.
        ValueError: if a peer cannot do it.
    """
    modes = {**MODES, **FROZEN_MODES}
    if name not in modes and dtype == "fp16":
        raise ValueError(f"{name} takes both passes inside its step, where no gradient scaler can come in between")
    return through_trainer(model, dtype, modes[name]) if name in modes else PEER_STEPS[name](model, dtype)
