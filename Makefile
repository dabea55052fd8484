# Each starts from nothing but Python 3.11 and pip: it makes the virtual environment .venv.
PYTHON ?= python3
VENV ?= .venv
export HF_HUB_OFFLINE = 1

# The tests that find most mistakes in the least time: the maths, the perturbation, its kernels, randomness, the trainer.
SMOKE = $(addprefix tests/test_,optim.py perturbation.py kernels.py rng.py trainer.py)

# For a machine that reaches no index.
WHEELS ?= $(wildcard wheels)
PIP = $(VENV)/bin/pip install --quiet $(if $(WHEELS),--no-index --find-links $(abspath $(WHEELS)))

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

# With the packages of $(PYTHON) if it has them, as it knows the machine's accelerator; else with those of $(VENV).
NEEDED = torch, transformers, accelerate, datasets, evaluate, sklearn, scipy, pytest, hypothesis
define with_packages
python=$(PYTHON); \
$$python -c 'import $(NEEDED)' 2> /dev/null || { $(MAKE) $(VENV)/accelerator && python=$(VENV)/bin/python; } && \
export PYTHONPATH=$(CURDIR):$(CURDIR)/packages
endef

accelerator:
	@$(with_packages) && $$python -m adasam_hf benchmark accelerator $(ARGS)

SWEEP ?= configs/sweeps/evidence/few_labels.yaml
GLUE ?= $(firstword $(wildcard glue ../shared/glue) nyu-mll/glue)
MINUTES ?= 20
JOBS ?= 6

accelerator-sweep:
	@$(with_packages) && $$python -m adasam_hf.glue.sentences runs/sentences && \
	$$python -m adasam_hf sweep $(SWEEP) --dataset_name_or_path $(GLUE) --minutes $(MINUTES) --jobs $(JOBS) $(ARGS)

$(VENV)/%: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --constraint constraints.txt --editable '.[$*]'
	touch $@
