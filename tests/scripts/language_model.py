"""A causal language model with everything taken from the module, and a Trainer that logs in compute_loss."""

import torch
import transformers
from transformers.trainer import Trainer
from transformers.training_args import TrainingArguments


class CountingTrainer(Trainer):
    """Overrides compute_loss, as scripts with their own loss do."""

    passes = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.passes += 1
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def main():
    (args,) = transformers.HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    transformers.set_seed(args.seed)
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    rows = [{"input_ids": torch.arange(8) + i % 20, "labels": torch.arange(8) + i % 20} for i in range(16)]
    trainer = CountingTrainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    print(f"passes={trainer.passes} steps={trainer.state.global_step}")


if __name__ == "__main__":
    main()
