"""Makes its arguments itself. First it imports modules of Transformers that import TrainingArguments themselves."""

import sys

import torch
import transformers.integrations.integration_utils  # noqa: F401
from transformers import BertConfig, BertForTokenClassification, Trainer, TrainingArguments


def main(**kwargs):
    quiet = {"use_cpu": True, "report_to": "none", "save_strategy": "no"}
    args = TrainingArguments("out", max_steps=1, logging_steps=1, **quiet, **kwargs)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertForTokenClassification(BertConfig(vocab_size=40, num_labels=3, **sizes))
    rows = [{"input_ids": torch.arange(6) + i, "labels": torch.arange(6) % 3} for i in range(8)]
    trainer = Trainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    print(f"optimizer={type(trainer.optimizer.optimizer).__name__}", flush=True)


if __name__ == "__main__":
    main(**dict(word.split("=") for word in sys.argv[1:] if word.startswith("optim=")))
