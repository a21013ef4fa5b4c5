# The doors of the project: `make` lists them. Every target that runs Python first brings the environment up to date,
# which takes about a tenth of a second when nothing changed.
PYTHON ?= python3
VENV ?= .venv
# STACK=cpu or STACK=cuda overrides the choice that packaging/install.py makes by asking nvidia-smi.
STACK ?= auto
# Handed on by demo, test and soak: make demo ARGS="...", make test ARGS="-k lda -x", make test ARGS="-n 4 --dist loadfile"
ARGS ?=
# How long make soak may take.
MINUTES ?= 5
BIN = $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test soak lint format docs clean

help: ## list these targets
	@echo "usage: make TARGET [ARGS=...] [MINUTES=n] [PYTHON=python3.12] [VENV=.venv] [STACK=auto|cpu|cuda]"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1	\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

install: ## make .venv, or bring it up to date (Python 3.11 or 3.12; CPU or CUDA stack)
	@VENV='$(VENV)' STACK='$(STACK)' '$(PYTHON)' packaging/install.py

demo: install ## raw MovieLens events -> history store -> trained, evaluated and batch-scored model
	@$(BIN)/python pipeline/demo.py $(ARGS)

test: install ## run the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

soak: install ## inject faults for MINUTES minutes (default 5) and print what was survived
	@$(BIN)/python tests/soak/run.py --minutes $(MINUTES) $(ARGS)

lint: install ## ruff (rules, format), codespell and mypy; changes nothing
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/codespell
	@$(BIN)/python -m mypy --config-file typings/mypy.ini

format: install ## ruff: put right what it can
	@$(BIN)/python -m ruff check --fix .
	@$(BIN)/python -m ruff format .

docs: install ## regenerate docs/reference from the config classes
	@$(BIN)/python -m elastic_rec.pipeline.reports.config_reference

clean: ## remove build products and caches; .venv, data and runs stay
	@rm -rf build dist *.egg-info packaging/fbgemm-gpu-shim/build packaging/fbgemm-gpu-shim/*.egg-info
	@rm -rf .pytest_cache .ruff_cache .hypothesis .mypy_cache
	@find configs feature_store models pipeline tests packaging -name __pycache__ -type d -prune -exec rm -rf {} +
