# Needs Python 3.11, 3.12 or 3.13 and make; everything else is installed into .venv.
# `make test PYTHON=/path/to/python3.12` chooses an interpreter, `make test ARGS="tests/rewards -x"` some tests.
# Tests run in two processes, a file in one of them; each takes up to 5 GB: `make test WORKERS=0` for one.

VENV := .venv
BIN := $(VENV)/bin
CANDIDATES := python3.13 python3.12 python3.11 python3 python
SUITABLE := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
TORCH := torch==2.13.0
WORKERS := 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test check bench soak clean

# Pages of 2 MiB for large arrays, where glibc gives the memory: a fifth of stage one's time is filling small ones.
demo: $(VENV)/.installed
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/openo3 demo --out demo_run $(ARGS)

test: $(VENV)/.installed-test
	$(PYTEST) $(ARGS)

check: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(PYTEST) $(ARGS)

bench: $(VENV)/.installed-test
	$(BIN)/python benchmarks/run.py $(ARGS)

soak: $(VENV)/.installed-test
	FUZZ_BATCHES=16000 $(BIN)/python -m pytest tests/rewards/test_fuzz.py --timeout=3600 $(ARGS)
	KILLS=20 $(BIN)/python -m pytest tests/train/test_kill.py tests/train/test_hosts.py -m "" --timeout=7200 $(ARGS)
	$(BIN)/python -m pytest tests -m soak --deselect tests/train/test_hosts.py --timeout=3600 $(ARGS)
	HOSTILE_FILES=500 $(BIN)/python -m pytest tests/data/test_hostile.py --timeout=3600 $(ARGS)
	$(BIN)/python benchmarks/big_model.py

clean:
	rm -rf $(VENV) demo_run

# An interpreter counts if it runs, is of a supported version and can make virtual environments.
$(BIN)/python:
	@for python in $(or $(PYTHON),$(CANDIDATES)); do \
	  if "$$python" -c '$(SUITABLE)' 2>/dev/null; then echo "$$python -m venv $(VENV)"; exec "$$python" -m venv $(VENV); fi; \
	done; \
	echo "make: no Python 3.11 to 3.13 with venv among: $(or $(PYTHON),$(CANDIDATES)); install one, or give PYTHON=path" >&2; \
	exit 2

$(VENV)/.installed: requirements.txt pyproject.toml | $(BIN)/python
	$(PIP) install --quiet -r requirements.txt -e .
	@touch $@

# torch first and alone: the tests use it as a reference on the CPU, and nothing else may choose its build.
$(VENV)/.installed-test: requirements.txt pyproject.toml | $(BIN)/python
	$(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet -r requirements.txt -e ".[test]"
	@touch $@ $(VENV)/.installed
