# make demo   a first run: SGD and Frob-SAM on 5,000 MNIST images, two workers, tracked in MLflow
# make test   the tests
# make lint   ruff and mypy --strict
# make bench  what a step costs on this machine, in about five minutes (docs/speed.md)
# make study  which member of the class earns its cost, in two to three hours (studies/which_member); it goes on where it was
#             interrupted; FASHION=FOLDER has Fashion-MNIST's files. make study-quick: a few minutes, which say nothing
# make chaos  faults from a seed over a training and a sweep, in half an hour: FAULTS=100 SEED=1 (docs/results/chaos.md)
# Each makes the virtual environment .venv and installs into it what is missing.

PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint bench study study-quick chaos install clean

demo: $(INSTALLED)
	$(VENV)/bin/phisam train mnist5k-sgd mnist5k-frob

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy phisam ray_jobs

bench: $(INSTALLED)
	$(VENV)/bin/phisam bench

study: $(INSTALLED)
	$(VENV)/bin/python studies/which_member/study.py $(if $(FASHION),--fashion $(FASHION))

study-quick: $(INSTALLED)
	$(VENV)/bin/python studies/which_member/study.py --quick

chaos: $(INSTALLED)
	$(VENV)/bin/python -m ray_jobs.faults --faults $(or $(FAULTS),20) --seed $(or $(SEED),0)

install: $(INSTALLED)

# constraints.txt holds the versions that the tests passed with, so that an install next year gets these.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
