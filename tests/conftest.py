import os

# Before anything of Hugging Face is imported: tests reach no hub and read nothing from the user's settings.
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

torch.set_num_threads(1)  # the models are tiny, and idle OpenMP threads spin

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
    parser.addoption("--compat", metavar="FILE", help="write what the tests with the marker `compat` show, as JSON")


def pytest_configure(config):
    config.compat = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call" or report.outcome == "skipped" or (report.when == "setup" and report.failed):
        for mark in item.iter_markers("compat"):
            scope = getattr(item, "callspec", None) and item.callspec.params.get("scope")
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
            cell = {"scope": scope, "refused": False, **mark.kwargs, "outcome": report.outcome, "reason": reason}
            item.config.compat.append({"group": mark.args[0], "what": mark.args[1], "test": item.nodeid, **cell})
    return report


def pytest_sessionfinish(session):
    if path := session.config.option.compat:
        Path(path).write_text(json.dumps(session.config.compat, indent=1) + "\n")


def pytest_collection_modifyitems(config, items):
    if config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="slow: run with -m 'slow or not slow'")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


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
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
