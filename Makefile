# On Windows, which has no make: the README gives the same commands as plain pip and python lines.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install quickstart notebooks worksheets offline-bundle test test-fast lint lab stamp test-colab test-newest clean
help:
	@echo "make quickstart  install, then fine-tune a real model in one notebook (about 10 minutes on 2 CPU cores)"
	@echo "make lab         open the notebooks in JupyterLab"
	@echo "make notebooks   execute lessons 01-07 and their solutions, and say what each took (under 20 minutes on 2 cores)"
	@echo "make worksheets  the lessons with empty cells, for a room that types; and the glossary in order"
	@echo "make offline-bundle  wheels, model and data in one zip, for a room without network"
	@echo "make test        the quickstart, then every test"
	@echo "make test-colab  the quickstart and what depends on versions, on those that free Colab ships (about 10 minutes)"
	@echo "make test-newest the quickstart on the newest versions of everything except torch"
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
	$(BIN)/ruff check .

test: lint quickstart test-fast
	$(BIN)/python -m pytest -m slow

test-fast: lint
	$(BIN)/python -m pytest -m "not slow" --numprocesses auto --maxprocesses 4

# Made anew each time, because the check looks at what the first cell changes in it.
test-colab:
	rm -rf .venv-colab && $(PYTHON) -m venv .venv-colab
	.venv-colab/bin/python -m pip install --quiet --no-deps -r tests/colab/pins.txt
	.venv-colab/bin/python -m tests.colab.check

# Not in CI: it changes from day to day. torch stays as constraints.txt has it.
test-newest:
	rm -rf .venv-newest && $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet $$(grep '^torch==' constraints.txt) -r requirements-dev.txt
	.venv-newest/bin/python -m tests.colab.newest

lab: install
	$(BIN)/jupyter lab notebooks/00_quickstart.ipynb

stamp: install
	$(BIN)/python -m tools.stamp $(if $(REPO),--repo $(REPO)) $(if $(TAG),--tag $(TAG))

clean:
	rm -rf $(VENV) .venv-colab .venv-newest runs
