# `make` lists the targets. Everything runs in .venv, made from pyproject.toml with the versions in constraints.txt, by uv
# where it is on PATH, else by pip.
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/condenser
UV := $(shell command -v uv)
venv = $(if $(UV),$(UV) venv --quiet --allow-existing --seed --python $(PYTHON) $(1),$(PYTHON) -m venv $(1))
pip = $(if $(UV),$(UV) pip install --quiet --python $(1)/bin/python,$(1)/bin/python -m pip install --quiet)

.DEFAULT_GOAL := help
.PHONY: help install demo study test test-min test-max test-gpu test-slurm test-faults test-all lint types audit format \
  docs dist lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

.venv/installed: pyproject.toml constraints.txt
	$(call venv,.venv)
	$(call pip,.venv) --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: .venv/installed  ## make the environment

demo: install  ## the main job on a small corpus: text, pre-training, export, retrieval, report (10 minutes on 2 cores)
	$(BIN)/python data/demo_corpus.py --output data/raw/demo
	$(RUN) prepare --input data/raw/demo/documents.jsonl --tokenizer train:8192 --kind spans \
	  --max-length 34 --output data/tokens/demo
	$(RUN) fit --config configs/demo.yaml
	$(RUN) export runs/demo --output runs/demo/export
	$(RUN) evaluate runs/demo/export --retrieval data/raw/demo/beir --baselines \
	  --finetune --finetune-epochs 2.5 --train-sizes 1000 --finetune-learning-rate 5e-4 --max-length 48 \
	  --query "find the shortest path between two nodes of a graph" --output runs/demo/evaluation
	$(RUN) report runs/demo --output runs/demo/report.html
	@echo "open runs/demo/report.html"

WIKIPEDIA ?= data/raw/wikipedia/*.jsonl.xz
BEIR ?= data/raw/beir
STS ?= data/raw/sts-b
PLAN ?= configs/study/scratch/plan.yaml
study: install  ## Condenser against plain MLM on Wikipedia: WIKIPEDIA=files BEIR=folder STS=folder PLAN=file (14 core-hours)
	$(BIN)/python configs/study/study.py $(PLAN) --wikipedia $(WIKIPEDIA) --beir $(BEIR) --sts $(STS)

test: install  ## the tests, in under 5 minutes on 2 cores
	$(BIN)/python -m pytest -n 3 --dist worksteal

test-min:  ## the tests with the lowest versions that are supported, in .venv-min
	$(call venv,.venv-min)
	$(call pip,.venv-min) --constraint constraints-min.txt --editable '.[dev]'
	.venv-min/bin/python -m pytest -n 3 --dist worksteal

test-max:  ## the tests with the newest versions that pyproject.toml allows, in .venv-max
	$(call venv,.venv-max)
	$(call pip,.venv-max) --upgrade --editable '.[dev]'
	.venv-max/bin/python -m pytest -n 3 --dist worksteal

test-gpu:  ## with PYTHON's own torch, on a GPU: all ways to compute a step, a run, the benchmark; runs/gpu.json (8 minutes)
	$(PYTHON) tests/gpu.py --json runs/gpu.json
	@if $(PYTHON) -c 'import pytest' 2>/dev/null; then PYTHONPATH=. $(PYTHON) -m pytest -m gpu; fi

test-slurm: install  ## as root, on Debian or Ubuntu: jobs in a SLURM of this machine, installed and started for it
	tests/slurm/install.sh runs/slurm
	SLURM_CONF=$(CURDIR)/runs/slurm/slurm.conf $(BIN)/python -m pytest -m slurm; \
	  status=$$?; tests/slurm/install.sh runs/slurm stop; exit $$status

N ?= 20
SEED ?= 0
test-faults: install  ## as root: N runs killed, stopped, out of disk at random moments end as undisturbed ones (10 minutes)
	PYTHONPATH=tests $(BIN)/python tests/faults/campaign.py --n $(N) --seed $(SEED)

test-all: install  ## the tests and the slow ones (with Ray and ONNX Runtime, 300 MB)
	$(call pip,.venv) --constraint constraints.txt --editable '.[ray,onnx]'
	$(BIN)/python -m pytest -m 'not slurm'

lint: install  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## mypy
	$(BIN)/mypy

audit: install  ## known vulnerabilities of the versions in constraints.txt, which it asks pypi.org about
	$(call pip,.venv) --constraint constraints.txt pip-audit
	$(BIN)/pip-audit --strict --no-deps --disable-pip --progress-spinner off --requirement constraints.txt

format: install  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs:  ## the pages of docs/ as a site in build/site, with an environment of their own, .venv-docs
	$(call venv,.venv-docs)
	$(call pip,.venv-docs) --constraint constraints.txt mkdocs-material
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo "open build/site/index.html"

dist:  ## the wheel and the source distribution, checked, in dist/
	rm -rf dist build/lib build/bdist.*
	$(call venv,.venv-docs)
	$(call pip,.venv-docs) --constraint constraints.txt build twine
	.venv-docs/bin/python -m build
	.venv-docs/bin/twine check --strict dist/*

lock:  ## uv.lock anew, for `uv sync --extra dev`, with the versions in constraints.txt
	@uv lock --quiet --default-index https://pypi.org/simple $(addprefix --upgrade-package ,$(shell sed '/^\#/d; s/ *;.*//' constraints.txt))

clean:  ## remove the demo's data and run, not the environment
	rm -rf data/raw/demo data/tokens/demo runs/demo
