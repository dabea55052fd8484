#!/usr/bin/env python
"""Named entities, parts of speech, ...: token classification with AdaSAM.

    python examples/token_classification.py --model_name_or_path roberta-base --train_file train.jsonl \
        --validation_file dev.jsonl --optim adasam --sam_rho 0.01 --output_dir runs/tokens

Each line of a file: {"tokens": ["EU", "rejects", ...], "tags": ["B-ORG", "O", ...]}.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    HfArgumentParser,
    set_seed,
)

from adasam_hf import AdaSAMTrainer, AdaSAMTrainingArguments


@dataclass
class Arguments:
    model_name_or_path: str = field(metadata={"help": "A model with a fast tokenizer."})
    train_file: str = field(metadata={"help": "JSON lines with tokens and tags."})
    validation_file: str = field(metadata={"help": "The same."})


def main() -> AdaSAMTrainer:
    ours, args = HfArgumentParser((Arguments, AdaSAMTrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    rows = load_dataset("json", data_files={"train": ours.train_file, "validation": ours.validation_file})
    names = sorted({tag for tags in rows["train"]["tags"] for tag in tags})
    tokenizer = AutoTokenizer.from_pretrained(ours.model_name_or_path)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = AutoModelForTokenClassification.from_pretrained(ours.model_name_or_path, num_labels=len(names), **labels)

    def prepare(row):
        encoded = tokenizer(row["tokens"], is_split_into_words=True, truncation=True)
        words = encoded.word_ids()
        # Only the first piece of a word has a label.
        firsts = [w is not None and (i == 0 or words[i - 1] != w) for i, w in enumerate(words)]
        tags = [names.index(row["tags"][w]) if first else -100 for w, first in zip(words, firsts, strict=True)]
        return {**encoded, "labels": tags}

    rows = rows.map(prepare, remove_columns=["tokens", "tags"])
    trainer = AdaSAMTrainer(
        model, args, DataCollatorForTokenClassification(tokenizer), rows["train"], rows["validation"], tokenizer
    )
    # This head does not divide its loss by num_items_in_batch: see docs/existing-script.md.
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
