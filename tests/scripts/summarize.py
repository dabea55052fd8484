"""Sequence to sequence, in the style of Transformers' run_summarization.py: Seq2SeqTrainer, generation."""

import torch
from transformers import (
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)


def main():
    (training_args,) = HfArgumentParser(Seq2SeqTrainingArguments).parse_args_into_dataclasses()
    set_seed(training_args.seed)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    rows = [{"input_ids": torch.arange(2, 8) + i % 5, "labels": torch.arange(3, 6) + i % 5} for i in range(16)]
    trainer = Seq2SeqTrainer(model=model, args=training_args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    trainer.predict(rows, max_length=4)
    trainer.save_model()


if __name__ == "__main__":
    main()
