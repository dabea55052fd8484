"""Trainers with a training_step of their own: one that goes on to the Trainer's, one that does not."""

import sys

import torch
from transformers import BertConfig, BertForTokenClassification, HfArgumentParser, Trainer, TrainingArguments


class PoliteTrainer(Trainer):
    calls = 0

    def training_step(self, model, inputs, *args, **kwargs):
        self.calls += 1
        return super().training_step(model, inputs, *args, **kwargs)


class StubbornTrainer(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


def main():
    kind = {"polite": PoliteTrainer, "stubborn": StubbornTrainer}[sys.argv.pop(1)]
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertForTokenClassification(BertConfig(vocab_size=40, num_labels=3, **sizes))
    rows = [{"input_ids": torch.arange(6) + i, "labels": torch.arange(6) % 3} for i in range(16)]
    trainer = kind(model=model, args=args, train_dataset=rows)
    trainer.train()
    print(f"calls={getattr(trainer, 'calls', None)}")


if __name__ == "__main__":
    main()
