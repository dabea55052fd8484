#!/usr/bin/env python
"""Images with a ResNet, whose BatchNorm statistics move once per step, at the unperturbed weights.

    python examples/image_classification.py --model_name_or_path microsoft/resnet-18 --train_dir images/train \
        --optim adasam --sam_rho 0.05 --remove_unused_columns false --output_dir runs/images

The folder has one folder of images for each class.
"""

from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from torch.nn.functional import interpolate
from transformers import AutoModelForImageClassification, HfArgumentParser, set_seed

from adasam_hf import AdaSAMTrainer, AdaSAMTrainingArguments


@dataclass
class Arguments:
    model_name_or_path: str = field(metadata={"help": "An image classifier."})
    train_dir: str = field(metadata={"help": "A folder of images for each class."})
    image_size: int = field(default=224, metadata={"help": "Images are scaled to so many pixels squared."})


def main() -> AdaSAMTrainer:
    ours, args = HfArgumentParser((Arguments, AdaSAMTrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    rows = load_dataset("imagefolder", data_dir=ours.train_dir, split="train")
    names = rows.features["label"].names
    model = AutoModelForImageClassification.from_pretrained(
        ours.model_name_or_path, num_labels=len(names), ignore_mismatched_sizes=True
    )
    rows = rows.with_format("torch")

    def collate(batch):
        images = [row["image"][:3].float()[None] / 127.5 - 1 for row in batch]
        size = (ours.image_size, ours.image_size)
        pixels = torch.cat([interpolate(image, size, mode="bilinear") for image in images])
        return {"pixel_values": pixels, "labels": torch.stack([row["label"] for row in batch])}

    trainer = AdaSAMTrainer(model, args, collate, rows)
    # This head does not divide its loss by num_items_in_batch: see docs/existing-script.md.
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
