"""setfit's trainer on MiniLM."""

import sys

from datasets import Dataset
from setfit import SetFitModel, Trainer, TrainingArguments


def main():
    path, out = sys.argv[1:]
    model = SetFitModel.from_pretrained(path)
    rows = Dataset.from_dict({"text": ["a warm film", "dull", "i loved it", "a waste of time"], "label": [1, 0, 1, 0]})
    args = TrainingArguments(out, batch_size=4, max_steps=3, logging_steps=1, save_strategy="no", report_to="none")
    trainer = Trainer(model=model, args=args, train_dataset=rows)
    trainer.train()


if __name__ == "__main__":
    main()
