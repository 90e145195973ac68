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
RSL := .venv-rsl
DOCS := .venv-docs
LOWEST := .venv-lowest
NEWEST := .venv-newest
TORCH ?= torch

# One thread: the networks are small, and the tests run in two processes.
export OMP_NUM_THREADS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYGAME_HIDE_SUPPORT_PROMPT := 1

.PHONY: help train test test-slow test-lowest test-newest lint format docs report sbx-env rsl-env clean

help:
	@echo "make train    train an agent; ALGO=$(ALGO) ENV=$(ENV) STEPS=$(or $(STEPS),<the configuration's>) SEED=$(SEED)"
	@echo "              ALGO is dual_clip_ppo, adaptive_kl_ppo, trpo_ext or reinforce; ARGS= takes any flag of"
	@echo "              sb3-ppo-ext train: ARGS=\"--save-freq 20000 -params gamma:0.9\""
	@echo "make test     run ruff, mypy and the test suite"
	@echo "make test-slow"
	@echo "              the tests that take many seconds each, which make test leaves out; CI runs both"
	@echo "make test-lowest, make test-newest"
	@echo "              the test suite with the lowest releases that pyproject.toml allows, and with the newest there"
	@echo "              are; PYTHON= names an interpreter, TORCH=torch==... the newest torch that is wanted"
	@echo "make lint     run ruff and mypy alone"
	@echo "make format   let ruff rewrite the code"
	@echo "make docs     build the documentation in docs/_build/html, with warnings as errors"
	@echo "make report   make the pages and the figures of benchmarks/results/learning and staleness from their runs"
	@echo "make sbx-env  make $(SBX), in which the benchmark runs SBX; see benchmarks/README.md"
	@echo "make rsl-env  make $(RSL), in which the benchmark runs rsl_rl; see benchmarks/README.md"
	@echo "make clean    remove .venv, .venv-* and what the tools have left; logs/ stays"

train: $(INSTALLED)
	$(BIN)/sb3-ppo-ext train --algo $(ALGO) --env $(ENV) --seed $(SEED) $(if $(STEPS),-n $(STEPS)) \
		-P --verbose 0 --num-threads 1 --vec-env dummy --eval-freq 20000 --eval-episodes 10 \
		-f logs --tensorboard-log logs/tensorboard $(ARGS)

test: lint
	$(BIN)/pytest -n 2

test-slow: $(INSTALLED)
	$(BIN)/pytest -n 2 -m slow

# Releases that were not made for each other warn of each other: that is an error in the pinned set alone.
test-lowest: $(LOWEST)/installed
	$(LOWEST)/bin/pytest -n 2 -W default -m "slow or not slow"

test-newest:
	$(call venv,$(NEWEST))
	$(NEWEST)/bin/python -m pip install --upgrade --upgrade-strategy eager -e '.[dev]' '$(TORCH)'
	$(NEWEST)/bin/pytest -n 2 -W default -m "slow or not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCS)/installed
	$(DOCS)/bin/sphinx-build -W --keep-going -b html docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

report: $(INSTALLED)
	$(BIN)/python -m benchmarks.learning.report
	$(BIN)/python -m benchmarks.staleness.report

clean:
	rm -rf .venv $(SBX) $(RSL) $(LOWEST) $(NEWEST) $(DOCS) docs/_build build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find sb3_ppo_ext tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# Where Python comes without ensurepip (Debian's python3 without python3-venv), its own pip fills the environment.
venv = $(PYTHON) -m venv $(1) >/dev/null || \
	{ $(PYTHON) -m venv --clear --without-pip $(1) && $(PYTHON) -m pip --python $(1)/bin/python install pip; }

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; PYTHON=... names one")'
	$(call venv,.venv)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

$(LOWEST)/installed: pyproject.toml constraints-lowest.txt
	$(call venv,$(LOWEST))
	$(LOWEST)/bin/python -m pip install --upgrade pip
	$(LOWEST)/bin/python -m pip install -c constraints-lowest.txt -e '.[dev]'
	@touch $@

$(DOCS)/installed: pyproject.toml constraints.txt
	$(call venv,$(DOCS))
	$(DOCS)/bin/python -m pip install -c constraints.txt -e '.[docs]'
	@touch $@

# SBX and JAX, for benchmarks/throughput.py; the environments and SB3 as in .venv, or the comparison would be of those.
sbx-env: $(SBX)/installed

$(SBX)/installed: constraints.txt
	$(call venv,$(SBX))
	$(SBX)/bin/python -m pip install -c constraints.txt sbx-rl==0.28.0 'gymnasium[mujoco]' stable-baselines3 torch
	@touch $@

# rsl_rl, for benchmarks/throughput.py; torch and gymnasium as in .venv.
rsl-env: $(RSL)/installed

$(RSL)/installed: constraints.txt
	$(call venv,$(RSL))
	$(RSL)/bin/python -m pip install -c constraints.txt rsl-rl-lib==5.5.1 gymnasium torch
	@touch $@
