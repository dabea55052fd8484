#!/usr/bin/env python
"""GLUE in a loop of its own with Accelerate, in the manner of Transformers' scripts without a Trainer.

    torchrun --nproc_per_node 2 examples/glue_no_trainer.py --model_name_or_path roberta-base --task_name mrpc

What the plain loop has not is `SharpnessAwareLoop` and its `backward`; with --rho 0 it is the plain loop.
"""

import argparse
import math

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    get_scheduler,
)

from adasam_hf import AdaSAM, SharpnessAwareLoop
from adasam_hf.glue.data import load_task, resolve_path
from adasam_hf.glue.metrics import make_compute_metrics
from adasam_hf.glue.tasks import TASKS, Task, get_task


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--task_name", required=True, choices=TASKS)
    parser.add_argument("--dataset_name_or_path", default="nyu-mll/glue", help="on the hub, or a folder in its layout")
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--per_device_train_batch_size", type=int, default=8)
    parser.add_argument("--per_device_eval_batch_size", type=int, default=32)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--num_train_epochs", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    parser.add_argument("--weight_decay", type=float, default=0.0)
    parser.add_argument("--num_warmup_steps", type=int, default=0)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument(
        "--mixed_precision", choices=("no", "fp16", "bf16"), help="by default that of accelerate config"
    )
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output_dir")
    parser.add_argument("--rho", type=float, default=0.05)
    parser.add_argument("--scope", choices=("batch", "microbatch"), default="batch")
    return parser.parse_args()


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: DataLoader, task: Task) -> dict[str, float]:
    """The task's metrics."""
    model.eval()
    outputs = [accelerator.gather_for_metrics((model(**batch).logits, batch["labels"])) for batch in loader]
    logits, labels = (torch.cat(part).float().cpu().numpy() for part in zip(*outputs, strict=True))
    return make_compute_metrics(task.metrics, task.is_regression)(EvalPrediction(logits, labels))


def main() -> nn.Module:
    args = parse()
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps, mixed_precision=args.mixed_precision
    )
    set_seed(args.seed)
    task = get_task(args.task_name)
    splits = ["train", *(split for split, _ in task.evaluations)]
    rows = load_task(task, args.dataset_name_or_path, splits)
    if args.max_train_samples is not None:
        rows["train"] = rows["train"].select(range(min(args.max_train_samples, len(rows["train"]))))
    path = resolve_path(args.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=max(1, len(task.labels)))

    def tokenize(batch):
        texts = [batch[column] for column in task.texts]
        return {**tokenizer(*texts, truncation=True, max_length=args.max_length), "labels": batch["label"]}

    def loader_of(split, batch_size, shuffle=False):
        data = rows[split].map(tokenize, batched=True, remove_columns=rows[split].column_names)
        collate = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)
        return DataLoader(data, batch_size, shuffle=shuffle, collate_fn=collate)

    with accelerator.main_process_first():
        loader = loader_of("train", args.per_device_train_batch_size, shuffle=True)
        evaluations = {suffix: loader_of(s, args.per_device_eval_batch_size) for s, suffix in task.evaluations}
    decayed, others = [], []
    for name, p in model.named_parameters():
        (others if "bias" in name or "LayerNorm" in name else decayed).append(p)
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others}]
    optimizer = AdaSAM(groups, lr=args.learning_rate, rho=args.rho)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    evaluations = {suffix: accelerator.prepare(part) for suffix, part in evaluations.items()}
    steps = args.num_train_epochs * math.ceil(len(loader) / args.gradient_accumulation_steps)
    # Accelerate steps a scheduler once for each process.
    counts = (count * accelerator.num_processes for count in (args.num_warmup_steps, steps))
    scheduler = accelerator.prepare(get_scheduler("linear", optimizer, *counts))
    sam = SharpnessAwareLoop(accelerator, model, optimizer, scope=args.scope)  # with the radius of the optimizer

    for epoch in range(args.num_train_epochs):
        model.train()
        for batch in loader:
            with accelerator.accumulate(model):
                sam.backward(lambda batch: model(**batch).loss, batch)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        numbers = sam.metrics()
        for suffix, part in evaluations.items():
            numbers |= {name + suffix: value for name, value in evaluate(accelerator, model, part, task).items()}
        accelerator.print(f"epoch {epoch + 1}:", *(f"{name}={value:.4g}" for name, value in numbers.items()))
    if args.output_dir and accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
    return model


if __name__ == "__main__":
    main()
