# make serve [MODEL=FOLDER] | make demo | make demo-real | make quick | make test | make test-cycles | make test-real | make setup | make check; everything lives in .venv.
PYTHON ?= python3
VENV := .venv
ARGS ?=
MODEL ?=
# Slow files come first (tests/conftest.py): none is left for the end, when the other process has nothing more to do.
PYTEST := $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup serve demo demo-real quick test test-cycles test-real check

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --progress-bar on -c constraints.txt -e '.[dev]'
	touch $@

setup: $(VENV)/.ready

serve: setup
	$(VENV)/bin/python serve.py $(if $(MODEL),--model $(MODEL)) $(ARGS)

demo: setup
	$(VENV)/bin/python -m benchmarks.demo $(ARGS)

demo-real: setup-worlds
	$(VENV)/bin/python -m benchmarks.demo_real $(if $(MODEL),--model $(MODEL)) $(ARGS)

test: setup
	$(PYTEST) $(ARGS)

test-cycles: setup
	$(PYTEST) tests_cycles $(ARGS)

quick: setup
	$(PYTEST) -m "not slow" $(ARGS)

test-real: setup
	$(VENV)/bin/python -m pytest tests_real --timeout 480 $(ARGS)

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

include make/vllm.mk
include make/worlds.mk
include make/clients.mk
