# `make help` lists what there is.

PYTHON ?= python3
ALGO ?= dual_clip_ppo
ENV ?= CartPole-v1
STEPS ?=
SEED ?= 0
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/installed
SBX := .venv-sbx

# One thread: the networks are small, and the tests run in two processes.
export OMP_NUM_THREADS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYGAME_HIDE_SUPPORT_PROMPT := 1

.PHONY: help train test lint format sbx-env clean

help:
	@echo "make train    train an agent; ALGO=$(ALGO) ENV=$(ENV) STEPS=$(or $(STEPS),<the configuration's>) SEED=$(SEED)"
	@echo "              ALGO is dual_clip_ppo, adaptive_kl_ppo, trpo_ext or reinforce; ARGS= takes any flag of"
	@echo "              sb3-ppo-ext train: ARGS=\"--save-freq 20000 -params gamma:0.9\""
	@echo "make test     run every check: ruff, mypy and the test suite"
	@echo "make lint     run ruff and mypy alone"
	@echo "make format   let ruff rewrite the code"
	@echo "make sbx-env  make $(SBX), in which the benchmark runs SBX; see benchmarks/README.md"
	@echo "make clean    remove .venv, $(SBX) and what the tools have left; logs/ stays"

train: $(INSTALLED)
	$(BIN)/sb3-ppo-ext train --algo $(ALGO) --env $(ENV) --seed $(SEED) $(if $(STEPS),-n $(STEPS)) \
		-P --verbose 0 --num-threads 1 --vec-env dummy --eval-freq 20000 --eval-episodes 10 \
		-f logs --tensorboard-log logs/tensorboard $(ARGS)

test: lint
	$(BIN)/pytest -n 2

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv $(SBX) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find sb3_ppo_ext tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# Where Python comes without ensurepip (Debian's python3 without python3-venv), its own pip fills the environment.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; PYTHON=... names one")'
	$(PYTHON) -m venv .venv >/dev/null || \
		{ $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

# SBX and JAX, for benchmarks/throughput.py; the environments and SB3 as in .venv, or the comparison would be of those.
sbx-env: $(SBX)/installed

$(SBX)/installed: constraints.txt
	$(PYTHON) -m venv $(SBX) >/dev/null || \
		{ $(PYTHON) -m venv --clear --without-pip $(SBX) && $(PYTHON) -m pip --python $(SBX)/bin/python install pip; }
	$(SBX)/bin/python -m pip install -c constraints.txt sbx-rl==0.28.0 'gymnasium[mujoco]' stable-baselines3 torch
	@touch $@
