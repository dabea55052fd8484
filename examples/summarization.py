#!/usr/bin/env python
"""Summarization, translation, ...: sequence to sequence with AdaSAM.

    python examples/summarization.py --model_name_or_path google-t5/t5-small --train_file train.jsonl \
        --validation_file dev.jsonl --optim adasam --sam_rho 0.01 --predict_with_generate --output_dir runs/summaries

Each line of a file: {"text": "...", "summary": "..."}.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq, HfArgumentParser, set_seed

from adasam_hf import AdaSAMSeq2SeqTrainer, AdaSAMSeq2SeqTrainingArguments


@dataclass
class Arguments:
    model_name_or_path: str = field(metadata={"help": "A sequence-to-sequence model."})
    train_file: str = field(metadata={"help": "JSON lines with text and summary."})
    validation_file: str = field(metadata={"help": "The same."})
    max_source_length: int = field(default=512, metadata={"help": "Longer texts are cut."})
    max_target_length: int = field(default=128, metadata={"help": "Longer summaries are cut."})


def main() -> AdaSAMSeq2SeqTrainer:
    ours, args = HfArgumentParser((Arguments, AdaSAMSeq2SeqTrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    rows = load_dataset("json", data_files={"train": ours.train_file, "validation": ours.validation_file})
    tokenizer = AutoTokenizer.from_pretrained(ours.model_name_or_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(ours.model_name_or_path)

    def prepare(row):
        encoded = tokenizer(row["text"], max_length=ours.max_source_length, truncation=True)
        target = tokenizer(text_target=row["summary"], max_length=ours.max_target_length, truncation=True)
        return {**encoded, "labels": target["input_ids"]}

    rows = rows.map(prepare, remove_columns=["text", "summary"])
    trainer = AdaSAMSeq2SeqTrainer(
        model, args, DataCollatorForSeq2Seq(tokenizer, model), rows["train"], rows["validation"], tokenizer
    )
    # This head does not divide its loss by num_items_in_batch: see docs/existing-script.md.
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    trainer.log_metrics("eval", trainer.evaluate(max_length=ours.max_target_length))
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
