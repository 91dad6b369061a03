# Needs python3 (3.11 or newer, with venv), a C++ compiler and make; everything else is installed
# into .venv. Choose another interpreter with PYTHON=python3.12.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HARNESS := $(VENV)/harness
QUICK ?=
ARGS ?=

.PHONY: help .venv demo test test-harness bench zoo study lint format types clean
.DELETE_ON_ERROR:

help:
	@echo "make demo [QUICK=1]   install, then run examples/demo.py"
	@echo "make test [ARGS=...]  install, then run the tests"
	@echo "make test-harness     install lm_eval beside that, and run the tests that need it"
	@echo "make bench [ARGS=...] time a model beside Hugging Face and others, into out/bench"
	@echo "make zoo [ARGS=...]   measure every architecture, then write docs/architectures.md"
	@echo "make study [ARGS=...] measure what drops cost, then write docs/study.md (under an hour)"
	@echo "make lint             ruff, formatting, spelling"
	@echo "make format           let ruff rewrite what it can"
	@echo "make types            pyright (needs Node.js, and fetches it where there is none)"
	@echo "make clean            remove what was built; .venv stays"

.venv: $(VENV)/.installed

# Order-only: the interpreter is a link whose date says nothing.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Stamps: installed again only when pyproject.toml changes.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@

.PRECIOUS: $(VENV)/.installed-%

# A venv of its own that also sees what .venv has: lm_eval brings scipy, and where that is installed
# transformers imports it in every process.
$(VENV)/.installed-harness: $(VENV)/.installed-test
	$(BIN)/python -m venv $(HARNESS)
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
	  > "$$($(HARNESS)/bin/python -c 'import site; print(site.getsitepackages()[0])')/beside.pth"
	$(BIN)/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	  print(*project['optional-dependencies']['eval'], sep='\n')" > $(HARNESS)/requirements.txt
	$(HARNESS)/bin/python -m pip install --quiet --requirement $(HARNESS)/requirements.txt
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py $(if $(filter-out 0,$(QUICK)),--quick)

# One thread: the same sums in the same order on every machine. A worker more than there are cores:
# tests of what a failing rank looks like mostly wait.
test: export OMP_NUM_THREADS := 1
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $$(($$(getconf _NPROCESSORS_ONLN) + 1)) $(ARGS)

test-harness: export OMP_NUM_THREADS := 1
test-harness: $(VENV)/.installed-harness
	$(HARNESS)/bin/python -m pytest -n 2 --dist loadfile tests/harness $(ARGS)

bench: $(VENV)/.installed-bench
	$(BIN)/python -m spdcompile.cli bench examples/models/bench-llama --tp 2 --spd-mask all \
	  --out out/bench $(ARGS)

zoo: $(VENV)/.installed
	$(BIN)/python -m tests.zoo --write docs/architectures.md $(ARGS)

# What was measured stays in out/study; ARGS="--anew" forgets it, ARGS="--only NAME" repeats a section.
study: $(VENV)/.installed-study
	$(BIN)/python -m examples.study $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed-dev
	$(BIN)/pyright

clean:
	rm -rf build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage
	find . -name $(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
