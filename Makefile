# On Windows, which has no make: the README gives the same commands as plain pip and python lines.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: lines help install quickstart notebooks worksheets offline-bundle test test-fast test-slow attack lint lab stamp combinations gpu-report test-colab test-newest clean
help:
	@echo "make quickstart  install, then fine-tune a real model in one notebook (about 10 minutes on 2 CPU cores)"
	@echo "make lab         open the notebooks in JupyterLab"
	@echo "make notebooks   execute lessons 01-07 and their solutions, and say what each took (under 20 minutes on 2 cores)"
	@echo "make worksheets  the lessons with empty cells, for a room that types; and the glossary in order"
	@echo "make offline-bundle  wheels, model and data in one zip, for a room without network"
	@echo "make test        the quickstart, then every test; and how many minutes each stage took"
	@echo "make test-colab  the quickstart and what depends on versions, on those that free Colab ships"
	@echo "make test-newest the quickstart and what depends on versions, on the newest versions of everything"
	@echo "make combinations  which kinds of training step plans choose, for tests/rehearsal (an hour; when planner or menu have changed)"
	@echo "make gpu-report  what benchmarks.gpu measured on a real card, as the table in README"
	@echo "make lint        format, lint, types (under 30 seconds)"
	@echo "make lines       how thin the package is: lines of each room beside its budget"
	@echo "make attack      cells in any order, kills and full disks, many times more than make test does (an hour)"
	@echo "make test-fast   the tests that need no trained model (under 3 minutes on 2 cores)"

install: $(VENV)/installed
$(VENV)/installed: requirements.txt requirements-dev.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "This kit needs Python 3.10 or newer; this is %d.%d. Use make PYTHON=/path/to/newer/python" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	touch $@

quickstart: install
	$(BIN)/python -m tools.run_notebook notebooks/00_quickstart.ipynb --into runs/quickstart

notebooks: install
	$(BIN)/python -m tools.run_course

worksheets: install
	$(BIN)/python -m tools.worksheets
	$(BIN)/python -m tools.glossary

offline-bundle: install
	$(BIN)/python -m tools.offline_bundle

lint: install
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Minutes of each stage on 2 cores, 2026-11-25, not always otherwise idle: install 1.3, quickstart 6.0, test-fast 3.1, test-slow 24.6 (of which
# rehearsals 6.7), notebooks 9.9, test-colab 8.0; in all about 53. CI's bar is 60. Each run prints its own.
test:
	$(PYTHON) -m tools.stages "make install" "make lint" "make quickstart" "make test-fast" "make test-slow"

lines: install
	$(BIN)/python -m tools.lines

test-fast: lint
	$(BIN)/python -m pytest -m "not slow" --numprocesses auto --maxprocesses 4

# Rehearsals measure neither time nor memory, so they share the cores; the others must have the machine to themselves.
test-slow: install
	$(BIN)/python -m pytest -m slow tests/rehearsal --numprocesses auto --maxprocesses 2 --dist loadfile
	$(BIN)/python -m pytest -m slow --ignore tests/rehearsal

# With ATTACK set, these play or kill more often: 300 sequences of cells instead of 40, 20 kills at each place instead of 3.
attack: install
	ATTACK=1 $(BIN)/python -m pytest -m slow tests/attack tests/test_kills.py tests/test_export_attacks.py

# Made anew each time, because the check looks at what the first cell changes in it. Colab's own pair, Python 3.13 and torch 2.11 with
# CUDA's libraries, needs a python3.13 and 15 GB of disk; otherwise it is the nearest pair, and a line says so.
test-colab:
	$(PYTHON) -m tests.colab.make_environment colab .venv-colab
	.venv-colab/bin/python -m tests.colab.check

# Not in CI: it changes from day to day. Several GB, as torch is the newest too; on Python 3.13 if there is one.
test-newest:
	$(PYTHON) -m tests.colab.make_environment newest .venv-newest
	.venv-newest/bin/python -m tests.colab.newest

lab: install
	$(BIN)/jupyter lab notebooks/00_quickstart.ipynb

stamp: install
	$(BIN)/python -m tools.stamp $(if $(REPO),--repo $(REPO)) $(if $(TAG),--tag $(TAG))

combinations: install
	$(BIN)/python -m benchmarks.combinations

gpu-report: install
	$(BIN)/python -m benchmarks.gpu_report

clean:
	rm -rf $(VENV) .venv-colab .venv-newest runs
