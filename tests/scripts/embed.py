"""sentence-transformers' trainer on MiniLM."""

import sys

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from transformers import HfArgumentParser


def main():
    model = SentenceTransformer(sys.argv.pop(1))
    (args,) = HfArgumentParser(SentenceTransformerTrainingArguments).parse_args_into_dataclasses()
    pairs = [("a warm film", "a warm and funny film", 0.9), ("dull", "i loved every minute", 0.1)] * 4
    one, other, score = zip(*pairs, strict=True)
    rows = Dataset.from_dict({"sentence1": list(one), "sentence2": list(other), "score": list(score)})
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=rows, loss=CosineSimilarityLoss(model))
    trainer.train()
    trainer.create_model_card()


if __name__ == "__main__":
    main()
