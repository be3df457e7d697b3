# The same commands for people and for CI. Everything is installed in .venv, from wheels, so that no
# compiler is needed. `make serve` installs what serving needs, all others tests and tools as well.
SHELL := /bin/sh
# Tests start hundreds of processes, which read what the first of them has compiled.
unexport PYTHONDONTWRITEBYTECODE
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.lockstep-installed
SERVING := $(VENV)/.lockstep-serving
# pip would compile a third of its time, on one core.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --no-compile
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # a template or two is no Python
TYPING := .typing/lockstep
TORCH ?= 2.13.0
RECIPE ?= demo.yaml
# Set PYTHON to choose the interpreter; the default is the first of these that starts.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo $$python; break; }; done)

.PHONY: setup serve test test-all test-compile test-clients check bench-control bench-exchange bench-frontend bench-layouts bench-overlap bench-vllm bench-kernels card-wheels plan-anchors demo-eval clean

setup: $(STAMP)

$(SERVING): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11, 3.12 or 3.13 found; name one with PYTHON=..." >&2; exit 1; }
	@echo "installing torch $(TORCH) and what serving needs into $(VENV), once: one to five minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) "torch==$(TORCH)"
	@$(PIP) -c constraints.txt -e .
	@$(COMPILE)
	@touch $@

$(STAMP): $(SERVING)
	@echo "installing what tests and checks need into $(VENV), once: about a minute"
	@$(PIP) -c constraints.txt -e ".[test,dev,otel]"
	@$(COMPILE)
	@touch $@

# mypy must see the checkout as the package lockstep, whatever its name.
$(TYPING):
	@mkdir -p $(@D) && ln -sfn .. $@

serve: $(SERVING)
	$(BIN)/launch --recipe $(RECIPE) $(OVERRIDES)

# Asks a running `make serve` the held-out cases. EVAL_ARGS="--save run.json" keeps the 2,002 answers
# for `python -m lockstep.recipes.demo.compare`.
demo-eval: setup
	$(BIN)/python -m lockstep.recipes.demo.evaluate $(EVAL_ARGS)

# Two workers: tests that start clusters in one, those of a served cluster in the other, then all others in both. A
# third gains nothing on two cores, not even one that only computes and gives way. The quick tier is what a change is
# tried with.
WORKERS ?= -n 2 --no-loadscope-reorder

test: setup
	$(BIN)/python -m pytest $(WORKERS) -m "not slow" $(PYTEST_ARGS)

test-all: setup
	$(BIN)/python -m pytest $(WORKERS) $(PYTEST_ARGS)

# Compiles every Triton kernel for each kind of NVIDIA card, without one. Tests compile all for sm_90
# and a few for others.
test-compile: setup
	LOCKSTEP_COMPILE=all $(BIN)/python -m pytest $(WORKERS) tests/kernels/triton/test_triton_compiles.py $(PYTEST_ARGS)

# The packages that speak to the server, in environments of their own (tests/clients/job.py).
test-clients: setup
	PYTHONPATH=tests $(BIN)/python tests/clients/job.py $(PYTEST_ARGS)

check: setup $(TYPING)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --num-workers 2

bench-control: setup
	$(BIN)/python benchmarks/bench_control.py

bench-vllm: setup
	$(BIN)/python benchmarks/bench_vllm.py $(BENCH_ARGS)

bench-frontend: setup
	$(BIN)/python benchmarks/bench_frontend.py

bench-layouts: setup
	$(BIN)/python benchmarks/bench_layouts.py $(BENCH_ARGS)

bench-overlap: setup
	$(BIN)/python benchmarks/bench_overlap.py $(BENCH_ARGS)

bench-exchange: setup
	$(BIN)/python benchmarks/bench_exchange.py $(BENCH_ARGS)

# Measures the kernels on this machine and draws plots; BENCH_ARGS="--only experts" measures some of
# them again. On a card, benchmarks/on_card.sh runs everything in one command.
bench-kernels: setup
	$(BIN)/python -m lockstep.kernels.bench $(BENCH_ARGS)
	$(BIN)/python -m lockstep.kernels.bench.plot

# Wheels of what the image of a card lacks, for on_card.sh where there is no network.
card-wheels: setup
	$(BIN)/python benchmarks/card_wheels.py

# Compares the lower bounds of `launch plan` with published figures.
plan-anchors: setup
	$(BIN)/python -m lockstep.launch.capacity.anchors > benchmarks/plan_anchors.md

clean:
	rm -rf $(VENV) .venv-clients .typing .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build benchmarks/wheels
