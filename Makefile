# Targets for developers. PYTHON selects the interpreter: make test PYTHON=.venv/bin/python
PYTHON ?= python
SANITIZED := build/sanitized

.PHONY: help install build test test-slow lint format docs bench cuda-report env dist sanitize clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: ## install in editable mode, with everything that the tests need
	$(PYTHON) -m pip install -e ".[test]"

build: ## recompile changed files of csrc/ in place (after make install; needs torch in the environment)
	$(PYTHON) setup.py -q build_ext --inplace

test: ## run the quick tests
	$(PYTHON) -m pytest -q -n auto

test-slow: ## run the tests that build or train something
	$(PYTHON) -m pytest -q -n auto -m slow

lint: ## run the checks of CI other than the tests
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: ## format the sources
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

docs: ## build the documentation site in build/site; broken links are errors (needs pip install -e ".[docs]")
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

bench: ## measure the speed-up on this machine
	$(PYTHON) benchmarks/bench_guidance.py

cuda-report: build ## print registers, spills and shared memory of every CUDA kernel and architecture
	$(PYTHON) benchmarks/cuda_report.py

env: ## print versions, backends, and why a backend is missing
	$(PYTHON) -m sgmim_fast.env

dist: ## build an sdist, and a wheel from it, in dist/ (needs pip install build)
	$(PYTHON) -m build

sanitize: ## build the CPU library with AddressSanitizer and UBSan in build/sanitized
	SGMIM_FAST_SANITIZE=1 $(PYTHON) setup.py -q build_ext --build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects

clean: ## remove build products and caches
	rm -rf build dist *.egg-info sgmim_fast/_C*.so sgmim_fast/_build_info.json .pytest_cache .ruff_cache .hypothesis
