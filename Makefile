# Each starts from nothing but Python 3.11 and pip: it makes the virtual environment .venv.
PYTHON ?= python3
VENV ?= .venv
export HF_HUB_OFFLINE = 1

# The tests that find most mistakes in the least time: the maths, the perturbation, its kernels, randomness, the trainer.
SMOKE = $(addprefix tests/test_,optim.py perturbation.py kernels.py rng.py trainer.py)

# Wheels for a machine that reaches no index, and where the models and data of a bundle lie as packages.
WHEELS ?= $(wildcard wheels)
PIP = $(VENV)/bin/pip install --quiet $(if $(WHEELS),--no-index --find-links $(abspath $(WHEELS)))
PACKAGES = PYTHONPATH=$(CURDIR):$(CURDIR)/packages
GLUE ?= $(firstword $(wildcard glue ../shared/glue) nyu-mll/glue)

.PHONY: quickstart smoke test lint accelerator accelerator-sweep

quickstart: $(VENV)/quickstart
	$(VENV)/bin/python scripts/quickstart.py $(ARGS)

test: $(VENV)/test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 --dist worksteal $(ARGS)

smoke: $(VENV)/test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 --dist worksteal $(SMOKE) $(ARGS)

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# With the packages of $(PYTHON) if it has them, which knows the machine's accelerator; else with those of $(VENV).
accelerator accelerator-sweep:
	python=$(PYTHON); \
	$$python -c 'import torch, transformers, accelerate, datasets, evaluate, sklearn, scipy, pytest, hypothesis' 2>/dev/null || \
		{ $(MAKE) $(VENV)/accelerator && python=$(VENV)/bin/python; } && \
	$(PACKAGES) $$python -m adasam_hf $(COMMAND_OF_$@) $(ARGS)

COMMAND_OF_accelerator = benchmark accelerator
SWEEP ?= configs/sweeps/evidence/few_labels.yaml
MINUTES ?= 20
JOBS ?= 6
COMMAND_OF_accelerator-sweep = sweep $(SWEEP) --dataset_name_or_path $(GLUE) --minutes $(MINUTES) --jobs $(JOBS)

$(VENV)/%: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --constraint constraints.txt --editable '.[$*]'
	touch $@
