#!/usr/bin/env python
"""A causal language model, of which LoRA adapters (PEFT) alone are trained, and alone are perturbed.

    python examples/causal_lm_lora.py --model_name_or_path Qwen/Qwen2.5-0.5B --train_file text.jsonl \
        --optim adasam --sam_rho 0.01 --output_dir runs/lora

Each line of the file: {"text": "..."}.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    set_seed,
)

from adasam_hf import AdaSAMTrainer, AdaSAMTrainingArguments


@dataclass
class Arguments:
    model_name_or_path: str = field(metadata={"help": "A causal language model."})
    train_file: str = field(metadata={"help": "JSON lines with text."})
    max_length: int = field(default=512, metadata={"help": "Longer texts are cut."})
    lora_rank: int = field(default=8, metadata={"help": "Of the adapters."})


def main() -> AdaSAMTrainer:
    ours, args = HfArgumentParser((Arguments, AdaSAMTrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    rows = load_dataset("json", data_files=ours.train_file, split="train")
    tokenizer = AutoTokenizer.from_pretrained(ours.model_name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(ours.model_name_or_path)
    model = get_peft_model(model, LoraConfig(r=ours.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"))

    def prepare(batch):
        return tokenizer(batch["text"], max_length=ours.max_length, truncation=True)

    rows = rows.map(prepare, batched=True, remove_columns="text")
    trainer = AdaSAMTrainer(model, args, DataCollatorForLanguageModeling(tokenizer, mlm=False), rows)
    trainer.train()
    trainer.save_model()  # the adapters
    return trainer


if __name__ == "__main__":
    main()
