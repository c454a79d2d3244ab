# The house's commands; `make` alone lists them.
# .venv is made when needed and left alone afterwards: the name of its stamp holds a sum of what it was made from
# (pyproject.toml, constraints.txt, the Python version, this folder), so any change of those installs again.

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

# Prints 3.11 and the like; fails where the command is a pyenv shim without a Python behind it.
VERSION_OF = -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])'
# A venv keeps its Python unless PYTHON names another.
STAMP_NOW = $(VENV)/installed-$$( { cat pyproject.toml constraints.txt; pwd -P; \
	"$${PYTHON:-$(BIN)/python}" $(VERSION_OF) | cut -d. -f1,2; } 2>/dev/null | cksum | cut -d' ' -f1)
export PYTHON
STAMP := $(shell export PYTHON='$(PYTHON)'; echo $(STAMP_NOW))

# Two workers share the cores, and each must not start a thread per core: OpenMP's barriers would cost 3 to 10x.
# Notebooks are written under the same setting, so that their stored outputs repeat.
test notebooks: export OMP_NUM_THREADS := 1
# Exercises draw numbers for each learner; stored outputs and tests have those of this one.
test notebooks: export MINIVLLM_LEARNER := example

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help lab test lint notebooks clean model

help:
	@echo 'make lab        install what is needed, fetch the default model, open JupyterLab on notebooks/'
	@echo 'make test       the same environment, then ruff, mypy, pytest and nbval over all notebooks'
	@echo 'make lint       ruff and mypy alone'
	@echo 'make notebooks  run notebooks/*.py and write the .ipynb files with their outputs'
	@echo 'make clean      remove .venv and everything generated; the cached model stays'
	@echo
	@echo 'PYTHON=/path/to/python3.11 chooses a Python; WORKERS=4 gives the tests more processes.'

lab: model
	@echo '== JupyterLab =='
	@exec $(BIN)/minivllm lab

model: $(STAMP)
	@echo '== Default model =='
	@$(BIN)/minivllm fetch

lint: $(STAMP)
	@echo '== Style: ruff =='
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m minivllm.course.author check
	@echo '== Types: mypy =='
	@$(BIN)/python -m mypy

# One pytest run, so one summary ends the output. loadfile keeps the cells of a notebook together, in order;
# the long files (notebooks, browser) start first so that no worker ends alone with them.
test: lint model
	@echo '== Tests and notebooks: pytest, nbval ($(WORKERS) workers) =='
	@$(BIN)/python -m pytest --nbval --nbval-current-env --nbval-cell-timeout=300 \
		-n $(WORKERS) --dist loadfile --no-loadscope-reorder $(wildcard notebooks tests/browser) tests

notebooks: model
	@echo '== Notebooks =='
	@$(BIN)/python -m minivllm.course.author build

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis test-artifacts dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Written last, so an interrupted install is done again. A venv that was moved, copied or made by another Python
# is made anew: its pip then reports another folder, or does not run at all.
$(STAMP):
	@set -e; \
	fail() { echo "$$1" >&2; exit 1; }; \
	fits() { "$$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; }; \
	version() { "$$1" $(VERSION_OF) 2>/dev/null || echo missing; }; \
	minor() { version "$$1" | cut -d. -f1,2; }; \
	is_sound() { \
		fits $(BIN)/python || return 1; \
		[ -z "$$PYTHON" ] || [ "$$(minor "$$PYTHON")" = "$$(minor $(BIN)/python)" ] || return 1; \
		$(BIN)/pip --version 2>/dev/null | grep -qF "from $$(pwd -P)/$(VENV)/"; }; \
	if ! is_sound; then \
		echo '== Python environment =='; \
		python=$$PYTHON; \
		for candidate in python3 python3.12 python3.11 python3.13; do \
			[ -n "$$python" ] || ! fits "$$candidate" || python=$$candidate; \
		done; \
		python=$${python:-python3}; \
		fits "$$python" || \
			fail "minivllm needs Python 3.11 to 3.13; $$python is $$(version "$$python"): set PYTHON=/path/to/python3.11"; \
		"$$python" -c 'import ensurepip, venv' 2>/dev/null || \
			fail "$$python cannot make a virtual environment: apt-get install python3-venv"; \
		python=$$("$$python" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))'); \
		echo "$$python, $$(version "$$python")"; \
		rm -rf $(VENV); \
		"$$python" -m venv $(VENV); \
	fi; \
	echo '== Packages (minutes the first time) =='; \
	command -v cc >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null || \
		echo 'note: no C compiler; a CPU needs none, Triton on a GPU does: apt-get install gcc'; \
	rm -f $(VENV)/installed-*; \
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[lab,dev]'; \
	touch $(STAMP_NOW)
