# Every target below first makes .venv if there is none. TORCH_INDEX, where set, is the package index torch comes from.
PYTHON ?= python3.11
TORCH_VERSION := 2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NPM := $(shell command -v npm)
NPM_STAMP := tests/interop/node_modules/.package-lock.json

.PHONY: help install interop demo test test-fast gpu coverage nat soak lint format bench bench-all clean
.DEFAULT_GOAL := help

help: ## Say what the targets do.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1|/' | awk -F'|' '{printf "  make %-9s %s\n", $$1, $$2}'

# Another index than the one that torch came from makes it come anew.
ifdef TORCH_INDEX
ifneq ($(TORCH_INDEX),$(shell cat $(STAMP) 2>/dev/null))
$(shell rm -f $(STAMP))
endif
endif

# fastecdsa, which libp2p requires, has no wheels: said before pip downloads gigabytes and ends in a compiler's errors.
define CHECK_COMPILER
$(BIN)/python -c 'import fastecdsa' 2>/dev/null \
|| printf '#include <gmp.h>\n#include <Python.h>\n' \
| $(CC) $(CPPFLAGS) $(CFLAGS) -I"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')" -E - \
  >/dev/null 2>&1 \
|| { echo "cannot build fastecdsa without a C compiler and the headers of GMP and Python:" \
"apt-get install gcc libc6-dev libgmp-dev python3.11-dev (see docs/deployment.md)" >&2; exit 1; }
endef

# torch is installed first and by itself: left to the resolver, its default build drags in gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(CHECK_COMPILER)
	$(BIN)/pip install --quiet torch==$(TORCH_VERSION) $(if $(TORCH_INDEX),--force-reinstall --index-url $(TORCH_INDEX))
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	# libp2p brings stubs for a trio of years ago, which the type checker would prefer to trio's own types.
	rm -rf $(VENV)/lib/python3*/site-packages/trio-stubs
	@echo $(TORCH_INDEX) > $@

install: $(STAMP) ## Make the environment; afterwards .venv/bin/metaswarm is the command.

# js-libp2p for tests/interop, where there is npm. Without it, or without a network, the tests that need it say so and are skipped.
interop: $(if $(NPM),$(NPM_STAMP))

$(NPM_STAMP): tests/interop/package.json tests/interop/package-lock.json
	-cd tests/interop && $(NPM) ci --no-audit --no-fund --loglevel=error

demo: $(STAMP) ## Three local peers hold a third of a model each and answer a question.
	$(BIN)/metaswarm demo

test: $(STAMP) interop ## Everything that needs no GPU.
	$(BIN)/python -m pytest -m 'not soak and not nat' --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

test-fast: $(STAMP) ## Unit and property tests but for the slow ones: for while you work.
	$(BIN)/python -m pytest -q -m 'not slow and not soak and not nat' tests/unit tests/property

# Where there is a GPU that torch can use. METASWARM_TEST_DEVICE names another: cuda:1, mps.
gpu: export METASWARM_TEST_DEVICE ?= cuda
gpu: $(STAMP) ## The tests of the engine, computed on a GPU.
	$(BIN)/python -m pytest tests/unit/engine

coverage: $(STAMP) interop ## The same, and which lines it did not reach.
	$(BIN)/coverage run -m pytest -m 'not soak and not nat'
	$(BIN)/coverage combine
	$(BIN)/coverage report

nat: $(STAMP) ## Peers behind NATs, in network namespaces: needs root, iproute2, nftables and ethtool.
	$(BIN)/python -m pytest -m "nat and not soak" tests/nat

soak: $(STAMP) interop ## The slow tests.
	$(BIN)/python -m pytest -m soak

lint: $(STAMP) ## Style, types and the direction of the imports.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Put the source into its canonical form.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## The quick ones of the benchmarks in docs/performance.md.
	$(BIN)/python -m benchmarks

bench-all: $(STAMP) ## All of them: hours.
	$(BIN)/python -m benchmarks --all

clean: ## Remove what the other targets made here (not the model cache).
	rm -rf $(VENV) tests/interop/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* out
