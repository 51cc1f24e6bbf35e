# Every target works alone, on a machine with nothing but make and a Python: it creates the virtual environment,
# installs what it needs, and runs. VENV=some/folder uses another environment, PYTHON=python3.12 another Python.

PYTHON ?= python3
VENV ?= .venv
OUT ?= quickstart-run
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

# Bytecode that is kept saves every process of a test a second, and pytest's workers ten.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help quickstart talk recipes study test test-fast test-full coverage fuzz bench bench-check bench-baseline test-slow test-machines test-browser test-gpu gpu-check test-full-size docs docs-serve figures lint release format clean

help: ## Show this list.
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1: /p' $(MAKEFILE_LIST) | awk -F': ' '{ printf "  make %-15s %s\n", $$1, $$2 }'

quickstart: $(VENV)/.installed-run ## Train a small Moshi with a memory on real speech, on the CPU, and write a report.
	$(BIN)/moshi-ttt quickstart --out $(OUT) --overwrite

talk: $(VENV)/.installed-run ## Talk to the small Moshi with a memory: start its server and open its page; ARGS='--memories kept'.
	$(BIN)/python scripts/talk.py $(ARGS)

recipes: $(VENV)/.installed-run ## Fetch real dialogue, fine-tune the small Moshi on it in eight ways, print a table.
	test -d speech || $(BIN)/python scripts/fetch_speech.py speech
	$(BIN)/python benchmarks/recipes.py speech --out recipes

KNOWN := dialogue-cs dialogue-nl prompts-en prompts-es prompts-fr
UNSEEN_VALID := prompts-it
UNSEEN := prompts-ru
# `make study STUDY=study-shipped SEEDS=0 ARGS=--shipped`: the best arms on the tiny Moshi that ships.
# A seed whose file is in RESULTS is not run again: `make study RESULTS=docs/study` reports those of docs/study.
SEEDS ?= 0 1 2
STUDY ?= study
RESULTS ?= $(STUDY)/results

study: $(VENV)/.installed-run ## Fetch real speech, train every variant and LoRA with three seeds, report what memory is worth.
	for voices in $(KNOWN) $(UNSEEN_VALID) $(UNSEEN); do test -d voices/$$voices || $(BIN)/python scripts/fetch_speech.py \
	  voices/$$voices --corpus $${voices%-*} --language $${voices#*-} || exit 1; done
	$(BIN)/python examples/study --out $(STUDY) --jobs 2 --results $(RESULTS) $(SEEDS:%=--seed %) $(ARGS) \
	  $(KNOWN:%=--known voices/%) $(UNSEEN_VALID:%=--unseen-valid voices/%) $(UNSEEN:%=--unseen voices/%)

# One process a core; JOBS=0 runs the tests in this one, as a debugger needs. Files stay together where they can: tests
# of one share what they train.
JOBS ?= auto

test: $(VENV)/.installed-dev ## Run the default test suite, on all cores. ARGS='-k name' passes options to pytest.
	$(BIN)/pytest -n $(JOBS) --dist worksteal $(ARGS)

test-fast: $(VENV)/.installed-dev ## Run the unit tests, about a minute on two cores.
	$(BIN)/pytest tests/unit -n $(JOBS) --dist worksteal $(ARGS)

test-full: $(VENV)/.installed-dev ## Run the default suite and every combination of the conformance kit, as CI does.
	$(BIN)/pytest -m 'not slow and not gpu and not full_size and not browser' -n $(JOBS) --dist worksteal $(ARGS)

coverage: $(VENV)/.installed-dev ## Run the default suite and report which lines it ran, in coverage/index.html too.
	$(BIN)/pytest -n $(JOBS) --dist worksteal --cov --cov-report=term:skip-covered --cov-report=html:coverage $(ARGS)

fuzz: $(VENV)/.installed-dev ## Compare random layers and streams with the definition, minutes; SEED=n repeats a run.
	@seed=$(or $(SEED),$$($(BIN)/python -c 'import random; print(random.randrange(2**32))')); \
	echo "The same run again: make fuzz SEED=$$seed"; \
	$(BIN)/pytest tests/fuzz --hypothesis-profile=fuzz --hypothesis-seed=$$seed $(ARGS)

bench: $(VENV)/.installed-run ## Run every benchmark at small sizes, and write bench-run/report.md; ARGS='--only scaling'.
	$(BIN)/python benchmarks/run.py --out bench-run --overwrite $(ARGS)

bench-check: $(VENV)/.installed-run ## Run them, and fail where a ratio is 20 % larger than in benchmarks/baseline.json.
	$(BIN)/python benchmarks/run.py --out bench-run --overwrite --check $(ARGS)

bench-baseline: $(VENV)/.installed-run ## Measure benchmarks/baseline.json again; the machine must be quiet.
	$(BIN)/python benchmarks/run.py --out bench-run --overwrite --write-baseline $(ARGS)

test-slow: $(VENV)/.installed-dev ## Run the tests that take minutes.
	$(BIN)/pytest -m slow $(ARGS)

test-machines: $(VENV)/.installed-dev ## Run the conformance suites with the instruction sets of other CPUs.
	$(BIN)/python scripts/other_machines.py

test-browser: $(VENV)/.installed-dev ## Run the tests of the server's page, which need Chromium.
	$(BIN)/pytest -m browser $(ARGS)

test-gpu: $(VENV)/.installed-dev ## Run the tests that need a CUDA device.
	$(BIN)/pytest -m gpu $(ARGS)

gpu-check: $(VENV)/.installed-run ## Check and time everything on one NVIDIA GPU, in about 8 minutes; ARGS='--budget 300'.
	$(BIN)/python scripts/gpu_check.py --out gpu-check $(ARGS)

test-full-size: $(VENV)/.installed-dev ## Run the 7B shapes on the CPU; needs about 20 GiB of memory.
	$(BIN)/pytest -m full_size $(ARGS)

SITE ?= build/site

docs: $(VENV)/.installed-dev ## Build the documentation site into build/site; a warning is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --site-dir $(abspath $(SITE))
	$(BIN)/python scripts/docs_site/check.py $(SITE)

docs-serve: $(VENV)/.installed-dev ## Show the site at http://localhost:8000, built again when a page changes.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

figures: $(VENV)/.installed-dev ## Draw the figures of the documentation; ARGS=--measure measures first.
	$(BIN)/python scripts/draw_figures.py docs/figures $(ARGS)

lint: $(VENV)/.installed-dev ## Check style, spelling, types and who imports whom.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/lint-imports

release: $(VENV)/.installed-dev ## Check everything a release needs, and tag it: RELEASING.md; ARGS='--dry-run'.
	$(BIN)/python scripts/release.py $(ARGS)

format: $(VENV)/.installed-dev ## Rewrite the code as `make lint` wants it.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and everything that was built.
	rm -rf .venv build dist bench-run plugins/common/prebuilt *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

# A stamp is written after everything is installed, so an installation that was interrupted is taken up again.
# The environment of `test` can run the quickstart too; that of `quickstart` is smaller.
$(VENV)/.installed-dev: pyproject.toml | $(BIN)/pip
	@echo "Installing moshi-ttt and its test tools into $(VENV) (about two minutes and 7 GB the first time)"
	$(PIP) -e ".[dev]"
	@touch $(VENV)/.installed-dev $(VENV)/.installed-run

$(VENV)/.installed-run: pyproject.toml | $(BIN)/pip
	@echo "Installing moshi-ttt into $(VENV) (about two minutes and 7 GB the first time)"
	$(PIP) -e .
	@touch $(VENV)/.installed-run

# pip is the last thing that venv makes: without it the environment is half-made.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; ok = (3, 10) <= sys.version_info < (3, 13); sys.exit(None if ok else "moshi-ttt needs Python 3.10, 3.11 or 3.12, and $(PYTHON) is " + sys.version.split()[0] + ". Name one with PYTHON=python3.12.")'
	@$(PYTHON) -m venv $(VENV) || { echo "Cannot create $(VENV). On Debian and Ubuntu: apt install python3-venv"; exit 1; }
