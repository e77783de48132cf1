# Everything happens in .venv; `make demo` and `make test` need Python >= 3.10 and nothing else.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install demo test test-slurm test-others lint check bench rivals pin clean
.DELETE_ON_ERROR:

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/ganscale shards write bundled:mnist data/mnist
	$(BIN)/ganscale train configs/demo.yaml

# The tests on a real SLURM mostly wait, so they do it beside the others.
test: install
	$(MAKE) --no-print-directory --jobs 2 test-slurm test-others

test-slurm:
	$(BIN)/python -m pytest -o cache_dir=.pytest_cache/slurm tests/slurm

test-others:
	$(BIN)/python -m pytest --ignore tests/slurm

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache

# What CI runs; `make test` alone is enough while one works.
check: lint test

# Every benchmark, the short way; `python -m benchmarks.NAME` is the long one.
bench: install
	$(BIN)/python -m benchmarks.invariance --quick
	$(BIN)/python -m benchmarks.step --quick
	$(BIN)/python -m benchmarks.loop --quick
	$(BIN)/python -m benchmarks.checkpoint --quick
	$(BIN)/python -m benchmarks.scaling --quick
	$(BIN)/python -m benchmarks.limit --quick
	$(BIN)/python -m benchmarks.data --quick
	$(BIN)/python -m benchmarks.shuffle --quick
	$(BIN)/python -m benchmarks.manifest --quick
	$(BIN)/python -m benchmarks.gaussians --quick
	$(BIN)/python -m benchmarks.faults --quick

# GAN libraries for `benchmarks.step`, without the packages of their own that it does not need.
rivals: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		torchgan==0.1.0 torch-mimicry==0.1.16

# The versions of this environment become those that everybody gets.
pin: install
	$(BIN)/python -m pip freeze --exclude-editable | $(BIN)/python tools/pin.py > constraints.txt

clean:
	rm -rf .venv data runs
