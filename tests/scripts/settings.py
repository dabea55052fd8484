"""Sets what Hugging Face's libraries and torch read when they are imported, and prints what they made of it."""

import os

names = {"HF_HOME": "home", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "HF_DATASETS_CACHE": "data"}
os.environ |= names | {"TRANSFORMERS_VERBOSITY": "error"}

import datasets  # noqa: E402
import huggingface_hub.constants as hub  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

print(hub.HF_HOME, hub.HF_HUB_CACHE, hub.HF_HUB_OFFLINE, torch.get_num_threads(), datasets.config.HF_DATASETS_CACHE)
print(transformers.logging.get_verbosity(), transformers.TrainingArguments("out", use_cpu=True).report_to)
