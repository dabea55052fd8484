# Each starts from nothing but Python 3.11 and pip: it makes the virtual environment .venv.
PYTHON ?= python3
VENV ?= .venv
export HF_HUB_OFFLINE = 1

# The tests that find most mistakes in the least time: the maths, the perturbation, its kernels, randomness, the trainer.
SMOKE = $(addprefix tests/test_,optim.py perturbation.py kernels.py rng.py trainer.py)

.PHONY: quickstart smoke test lint

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

$(VENV)/%: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet torch==2.13.0
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@
