# make demo   trains a whole UAE on this machine's CPU and writes its report
# make check  ruff, mypy and the fast tests: before every commit
# make test   runs all the tests
# make docs   builds the documentation as a site
# Each makes .venv and installs into it when setup.py or pyproject.toml changed; otherwise it starts at once.

PYTHON ?= python3
WORKDIR ?= runs/demo
# Further flags of the run or of pytest, such as ARGS="--config.seed=1" or ARGS="-k report".
ARGS ?=

BIN := .venv/bin
REQUIREMENTS := setup.py pyproject.toml

.PHONY: demo check lint types fast test docs clean

# One arena that keeps its memory spares the page faults of short-lived buffers.
demo: export MALLOC_ARENA_MAX := 1
demo: export MALLOC_MMAP_MAX_ := 0
demo: export MALLOC_TRIM_THRESHOLD_ := 8589934592
demo: export MALLOC_TOP_PAD_ := 268435456
demo: export JAX_PLATFORMS := cpu
demo: .venv/.installed
	$(BIN)/uae-jax train --config=configs/scenes.py --workdir=$(WORKDIR) $(ARGS)
	@echo "The report, for a browser:"
	@$(BIN)/uae-jax report --workdir $(WORKDIR)

# The three run at the same time: mypy uses one core only.
check: .venv/.installed-test
	@$(MAKE) --no-print-directory -j3 lint types fast

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed-test
	$(BIN)/mypy

fast: .venv/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m fast --durations=5 $(ARGS)

test: .venv/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

docs: export NO_MKDOCS_2_WARNING := 1
docs: .venv/.installed-docs
	$(BIN)/mkdocs build --strict
	@echo "The site: build/site/index.html"

# Runs, their checkpoints and .venv stay.
clean:
	rm -rf build .pytest_cache .ruff_cache .mypy_cache *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

# The stamps are touched only after pip has succeeded, so that an interrupted installation is taken up again.
.venv/.installed: $(REQUIREMENTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/.installed-test: $(REQUIREMENTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch .venv/.installed $@

.venv/.installed-docs: $(REQUIREMENTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch .venv/.installed $@
