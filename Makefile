# Everything is installed into .venv; `make demo` and `make test` only need Python >= 3.10.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install demo test test-slurm test-first-half test-second-half test-torch lint check image-check bench rivals pin clean
.DELETE_ON_ERROR:

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/ganscale shards write bundled:mnist data/mnist
	@# A run that Ctrl-C has stopped is not an error: the same command continues it.
	trap : INT; $(BIN)/ganscale train configs/demo.yaml || test $$? -eq 75

# Two halves that take about as long, for two cores; the tests on a real SLURM mostly wait.
FIRST_HALF := tests/config tests/distributed tests/plan $(wildcard tests/test_*.py)
# They hide GPUs: what runs there is in tests/cuda, for `make gpu`.
PYTEST = CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -o cache_dir=.pytest_cache/$@

test: install
	$(MAKE) --no-print-directory --jobs 3 test-slurm test-first-half test-second-half

test-slurm:
	$(PYTEST) tests/slurm

test-first-half:
	$(PYTEST) $(FIRST_HALF)

test-second-half:
	$(PYTEST) $(addprefix --ignore=,tests/slurm $(FIRST_HALF))

# What another torch could change, in an environment of its own (gigabytes): the oldest accepted by
# default, `make test-torch TORCH=2.14.1` for another. The README names those that passed.
TORCH ?= 2.9.1
TORCH_ENV = .venv-torch-$(TORCH)
TORCH_TESTS = tests/objectives tests/networks tests/distributed/test_ranks.py \
	tests/distributed/test_invariance.py tests/training/test_compile.py \
	tests/training/test_network_trial.py tests/training/test_trainer.py \
	tests/checkpoints/test_checkpoint.py tests/data/test_decoding.py tests/data/test_loader_process.py

test-torch:
	test -x $(TORCH_ENV)/bin/python || $(PYTHON) -m venv $(TORCH_ENV)
	@# torch pins a version of sympy, often another one than ours.
	grep -vE '^(torch|sympy)==' constraints.txt > $(TORCH_ENV)/constraints.txt
	$(TORCH_ENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c $(TORCH_ENV)/constraints.txt torch==$(TORCH) -e '.[test]'
	$(TORCH_ENV)/bin/python -m pytest -o cache_dir=.pytest_cache/$(TORCH) $(TORCH_TESTS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache

# What CI runs; `make test` alone is enough during development.
check: lint test

# Builds the image without a Docker daemon and trains in it; a few minutes. A part of CI.
image-check:
	tools/check_image.sh

# Every benchmark, in its short form; `python -m benchmarks.NAME` is the long one.
bench: install
	$(BIN)/python -m benchmarks.invariance --quick
	$(BIN)/python -m benchmarks.step --quick
	$(BIN)/python -m benchmarks.penalty --quick
	$(BIN)/python -m benchmarks.launches --quick
	$(BIN)/python -m benchmarks.loop --quick
	$(BIN)/python -m benchmarks.checkpoint --quick
	$(BIN)/python -m benchmarks.scaling --quick
	$(BIN)/python -m benchmarks.limit --quick
	$(BIN)/python -m benchmarks.evaluation --quick
	$(BIN)/python -m benchmarks.data --quick
	$(BIN)/python -m benchmarks.shuffle --quick
	$(BIN)/python -m benchmarks.manifest --quick
	$(BIN)/python -m benchmarks.gaussians --quick
	$(BIN)/python -m benchmarks.stacked_mnist --quick
	$(BIN)/python -m benchmarks.emoji --quick
	$(BIN)/python -m benchmarks.adaptive --quick
	$(BIN)/python -m benchmarks.faults --quick

# On a machine with a GPU: the tests and benchmarks there, in less than eight minutes, written to
# results/. `make gpu PYTHON=python3` installs nothing and takes that Python, with the packages that
# it has: without a network, for example.
.PHONY: gpu
ifeq ($(origin PYTHON),file)
gpu: install
	$(BIN)/python -m benchmarks.gpu
else
gpu:
	$(PYTHON) -m benchmarks.gpu
endif

# GAN libraries for `benchmarks.step`, without the dependencies that it does not need.
rivals: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		torchgan==0.1.0 torch-mimicry==0.1.16

# Pins the versions of this environment for everyone.
pin: install
	$(BIN)/python -m pip freeze --exclude-editable | $(BIN)/python tools/pin.py > constraints.txt

clean:
	rm -rf .venv .venv-torch-* data runs
