# Verbs for working on sgmim_fast. PYTHON picks the interpreter: make test PYTHON=.venv/bin/python
PYTHON ?= python
SANITIZED := build/sanitized

.PHONY: help install build test test-slow lint format docs bench cuda-report env dist sanitize clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: ## install in editable mode with all that the tests need
	$(PYTHON) -m pip install -e ".[test]"

build: ## compile what changed in csrc/, in place (after make install; needs torch in the environment)
	$(PYTHON) setup.py -q build_ext --inplace

test: ## the quick tests
	$(PYTHON) -m pytest -q -n auto

test-slow: ## the tests that build or train something
	$(PYTHON) -m pytest -q -n auto -m slow

lint: ## what CI checks besides the tests
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: ## put the sources in order
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

docs: ## the documentation site, in build/site; a broken link fails (needs pip install -e ".[docs]")
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

bench: ## what the kernels buy on this machine
	$(PYTHON) benchmarks/bench_guidance.py

cuda-report: build ## registers, spills and shared memory of every CUDA kernel and architecture
	$(PYTHON) benchmarks/cuda_report.py

env: ## versions, backends, and why a backend is missing
	$(PYTHON) -m sgmim_fast.env

dist: ## sdist, and a wheel made of it, in dist/ (needs pip install build)
	$(PYTHON) -m build

sanitize: ## the CPU library with AddressSanitizer and UBSan, in build/sanitized
	SGMIM_FAST_SANITIZE=1 $(PYTHON) setup.py -q build_ext --build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects

clean: ## remove what was built
	rm -rf build dist *.egg-info sgmim_fast/_C*.so sgmim_fast/_build_info.json .pytest_cache .ruff_cache .hypothesis
