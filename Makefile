# make demo   a first run: SGD and Frob-SAM on 5,000 MNIST images, two workers, tracked in MLflow
# make test   the tests
# make lint   ruff and mypy --strict
# make bench  what a step costs on this machine, in about five minutes (docs/speed.md)
# Each makes the virtual environment .venv and installs into it what is missing.

PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint bench install clean

demo: $(INSTALLED)
	$(VENV)/bin/phisam train mnist5k-sgd mnist5k-frob

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy phisam ray_jobs

bench: $(INSTALLED)
	$(VENV)/bin/phisam bench

install: $(INSTALLED)

# constraints.txt holds the versions that the tests passed with, so that an install next year gets these.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
