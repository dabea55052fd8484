"""trl's SFTTrainer on a small GPT-2 with MiniLM's tokenizer."""

import sys

from datasets import Dataset
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, HfArgumentParser
from trl import SFTConfig, SFTTrainer


def main():
    tokenizer = AutoTokenizer.from_pretrained(sys.argv.pop(1))
    tokenizer.eos_token = tokenizer.sep_token
    (args,) = HfArgumentParser(SFTConfig).parse_args_into_dataclasses()
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2)
    rows = Dataset.from_dict({"text": ["a warm and funny film", "dull and far too long"] * 8})
    trainer = SFTTrainer(model=GPT2LMHeadModel(config), args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.create_model_card()


if __name__ == "__main__":
    main()
