# Everything a fresh checkout needs: `make quickstart` runs the main job, `make test` the tests. Both build .venv first.
PYTHON ?= python3.11
VENV   ?= .venv
# Another package index for torch and torchvision, such as PyTorch's for machines without a GPU: make quickstart TORCH_INDEX=URL
TORCH_INDEX ?=
BIN     = $(VENV)/bin
PYTEST  = $(BIN)/python -m pytest

.PHONY: quickstart test fuzz mutate test-slow test-lowest test-slurm test-slurm-full bench gpu-check rehearsal lint format hooks docs clean

quickstart: $(VENV)/ready
	$(BIN)/ssl-locat pretrain quickstart

test: $(VENV)/ready
	$(PYTEST) -n 2 --dist worksteal -m "not slow and not slurm" $(ARGS)

# The fuzz campaigns of `make test` with fifty times as many cases: about an hour.
fuzz: $(VENV)/ready
	$(PYTEST) -n 2 --dist worksteal -k fuzzed --fuzz-factor 50 $(ARGS)

# Faults planted in our own code, one by one: would the tests notice? Half an hour of a core or more; goes on where it stopped (build/mutate).
mutate: $(VENV)/ready
	$(BIN)/python tests/mutate.py measure
	$(BIN)/python tests/mutate.py run $(ARGS)
	$(BIN)/python tests/mutate.py run --deep $(ARGS)
	$(BIN)/python tests/mutate.py show

test-slow: $(VENV)/ready
	$(PYTEST) -m "slow and not slurm" $(ARGS)

# The oldest versions that pyproject promises, installed apart; the quick tests only.
test-lowest: .venv-lowest/ready
	.venv-lowest/bin/python -m pytest -n 2 --dist worksteal -m "not slow and not slurm" $(ARGS)

test-slurm: $(VENV)/ready
	launch/dev_slurm test -- $(CURDIR)/$(PYTEST) -m "slurm and not slow" $(ARGS)

# The second time with accounts (slurmdbd), for what depends on them.
test-slurm-full: $(VENV)/ready
	launch/dev_slurm test -- $(CURDIR)/$(PYTEST) -m slurm $(ARGS)
	launch/dev_slurm test --accounting -- $(CURDIR)/$(PYTEST) -m slurm -k "states or crash" $(ARGS)

bench: $(VENV)/ready
	$(BIN)/ssl-locat bench all $(ARGS)

# What a new GPU must show first, in ten minutes; results are written as they come (build/gpu_check). SMALL=1 tries it on a CPU, with everything cut small.
gpu-check: $(VENV)/ready
	GPU_CHECK_SMALL=$(SMALL) CIFAR10=$(CIFAR10) $(BIN)/python tests/gpu_check.py $(ARGS)

# ImageNet's count of samples through a recipe's whole life, with a tiny network; resumes where it stopped. ARGS="--scale 0.01" for a hundredth.
rehearsal: $(VENV)/ready
	$(BIN)/ssl-locat bench rehearsal $(ARGS)

lint: $(VENV)/ready
	$(BIN)/ruff check ssl_locat tests
	$(BIN)/ruff format --check ssl_locat tests
	$(BIN)/mypy
	$(PYTEST) --durations=0 --durations-min=5 tests/test_layout.py -k "point_down or cycle or room or picture"
	$(PYTEST) --durations=0 --durations-min=5 tests/test_docs.py -k links

# Lint before each commit (.pre-commit-config.yaml).
hooks: $(VENV)/ready
	$(BIN)/pre-commit install

format: $(VENV)/ready
	$(BIN)/ruff check --fix ssl_locat tests
	$(BIN)/ruff format ssl_locat tests

docs: $(VENV)/ready
	$(BIN)/pip install -q -c constraints.txt -e ".[docs]"
	$(BIN)/mkdocs build --strict

# pyproject or constraints changed -> install again. torch comes as the ordinary wheel, which runs on CPU and GPU, unless TORCH_INDEX names
# where to take those two from; what they need comes with the second line, to which 2.15.0+cpu is a 2.15.0.
$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	test -z "$(TORCH_INDEX)" || $(BIN)/pip install -q --no-deps --index-url "$(TORCH_INDEX)" $(shell grep -E '^(torch|torchvision)==' constraints.txt)
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

.venv-lowest/ready: pyproject.toml constraints-lowest.txt
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest || python3 -m venv .venv-lowest
	.venv-lowest/bin/pip install -q -c constraints-lowest.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv .venv-lowest build dist site *.egg-info
