# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

.PHONY: quickstart test equality coverage slow check docs dist notebooks outputs clean

quickstart: $(INSTALLED)  ## install, then run the main job on the data and the model that come along
	$(BIN)/fedmerge run quickstart

test: $(INSTALLED_DEV)  ## the fast tests
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not gpu"

equality: $(INSTALLED_DEV)  ## the tests of equality again, with the kernels of other processors
	ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest -q -n $(JOBS) -m "equality and not slow and not gpu"
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest -q -n $(JOBS) -m "equality and not slow and not gpu"

coverage: $(INSTALLED_DEV)  ## the fast tests, and the lines of the package that none of them runs
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not gpu" --cov --cov-report=term

slow: $(INSTALLED_DEV)  ## the tests that take longer
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "slow and not gpu"

check: $(INSTALLED_DEV)  ## formatting, lint, types, imports between rooms, docstrings
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/docstrings.py

docs: $(INSTALLED_DEV)  ## the site, into build/site; warnings are errors, nothing is fetched
	$(BIN)/mkdocs build --strict --quiet

dist: $(INSTALLED_DEV)  ## sdist and wheel, after the wheel was tried in an empty environment
	$(BIN)/python -m pytest -m slow tests/test_distribution.py
	$(BIN)/python -m hatchling build

notebooks: $(INSTALLED_DEV)  ## run the notebooks as they are
	$(BIN)/python -m pytest -m slow tests/test_notebooks.py

outputs: $(INSTALLED_DEV)  ## run the notebooks, and keep what they show in them
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo]"
	touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo,dev]"
	touch $@
