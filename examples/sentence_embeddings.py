#!/usr/bin/env python
"""Sentence embeddings: sentence-transformers' own trainer, made sharpness-aware by the two mixins.

    python examples/sentence_embeddings.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \
        --train_file pairs.jsonl --optim adasam --sam_rho 0.01 --output_dir runs/embeddings

Each line of the file: {"sentence1": "...", "sentence2": "...", "score": 0.8}, with scores from 0 to 1.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from transformers import HfArgumentParser

from adasam_hf import SharpnessAwareArgumentsMixin, SharpnessAwareTrainerMixin


@dataclass(repr=False)
class EmbeddingArguments(SharpnessAwareArgumentsMixin, SentenceTransformerTrainingArguments):
    """Their arguments and ours."""


class EmbeddingTrainer(SharpnessAwareTrainerMixin, SentenceTransformerTrainer):
    """Their trainer with the two-pass step."""


@dataclass
class Arguments:
    model_name_or_path: str = field(metadata={"help": "A sentence-transformers model."})
    train_file: str = field(metadata={"help": "JSON lines with sentence1, sentence2 and score."})


def main() -> EmbeddingTrainer:
    ours, args = HfArgumentParser((Arguments, EmbeddingArguments)).parse_args_into_dataclasses()
    rows = load_dataset("json", data_files=ours.train_file, split="train")
    model = SentenceTransformer(ours.model_name_or_path)
    trainer = EmbeddingTrainer(model, args, train_dataset=rows, loss=CosineSimilarityLoss(model))
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
