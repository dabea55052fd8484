"""Text classification in the style of Transformers' run_glue.py: dataclasses, checkpoints, resume."""

import sys
from dataclasses import dataclass, field

from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

SENTENCES = ["a warm and funny film", "dull and far too long", "i loved every minute", "a waste of time"]


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "A model."})
    fail_at: int | None = field(default=None, metadata={"help": "Raise an error instead of this step."})


class FailingTrainer(Trainer):
    fail_at = None

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.state.global_step == self.fail_at:
            raise RuntimeError("the script's own error")
        return super().compute_loss(model, inputs, *args, **kwargs)


def main():
    parser = HfArgumentParser((ModelArguments, TrainingArguments))
    model_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(model_args.model_name_or_path)
    rows = Dataset.from_dict({"text": SENTENCES * 4, "label": [1, 0, 1, 0] * 4})
    rows = rows.map(lambda row: tokenizer(row["text"]), remove_columns="text")
    trainer = FailingTrainer(
        model=model,
        args=training_args,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.fail_at = model_args.fail_at
    if training_args.do_train:
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_state()
    if training_args.do_eval:
        trainer.log_metrics("eval", trainer.evaluate())
    return 0 if training_args.do_train else 3


if __name__ == "__main__":
    sys.exit(main())
