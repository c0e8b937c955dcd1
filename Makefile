# What a person types. `make demo` and `make test` work on a fresh clone with Python 3.11+ and pip, nothing else.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
MODEL  := $(HOME)/.cache/peftcli/SmolLM2-135M-Instruct
STAMP  := $(VENV)/.installed

.PHONY: help install demo model encoder compare costs support test test-gpu test-deepspeed check format lint types \
        schema bench torture clean
.DEFAULT_GOAL := help

help:  ## Say what can be made.
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## Make .venv with everything that demo, test and check need.

$(STAMP): pyproject.toml configs/constraints.txt
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c configs/constraints.txt "torch==2.13.0"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c configs/constraints.txt -e ".[dev]"
	@touch $@

model: $(STAMP)  ## Fetch and convert the demo model, once.
	@$(BIN)/python scripts/demo_model.py --out $(MODEL) > /dev/null

encoder: $(STAMP)  ## Fetch the demo encoder, once.
	@$(BIN)/python -m scripts.demo_encoder > /dev/null

compare: encoder  ## Train every method on one small classification set and print a table.
	@$(BIN)/python scripts/compare_methods.py

costs: model  ## Measure what a base in 4 or 8 bits costs and saves on a CPU.
	@$(BIN)/python scripts/nf4_costs.py

demo: model  ## Train, evaluate, merge and answer with a real model, in a few minutes on a CPU.
	$(BIN)/peftcli train recipes/quickstart.yaml --overwrite
	$(BIN)/peftcli merge runs/quickstart
	$(BIN)/peftcli eval runs/quickstart
	$(BIN)/peftcli generate runs/quickstart --base --max-new-tokens 24 --prompt-file recipes/data/demo_prompts.txt

test: $(STAMP)  ## Run the tests, several files at once.
	@$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-gpu: $(STAMP)  ## Run the tests that need one CUDA device, or two; each says what it lacks.
	@PEFTCLI_TEST_GPU=1 $(BIN)/python -m pytest -rs tests/gpu

format: $(STAMP)  ## Format the code.
	@$(BIN)/ruff format peftcli scripts tests
	@$(BIN)/ruff check --fix --quiet peftcli scripts tests

lint: $(STAMP)
	@$(BIN)/ruff format --check --quiet peftcli scripts tests || { echo "not formatted: make format"; exit 1; }
	@$(BIN)/ruff check peftcli scripts tests

types: $(STAMP)
	@$(BIN)/mypy

check: lint types test  ## Format, lint, types and tests: what CI runs.

test-deepspeed: $(STAMP)  ## Install DeepSpeed apart, on top of .venv, and run the tests that need it.
	@test -d .venv-deepspeed || $(BIN)/python -m venv .venv-deepspeed
	@for v in $(BIN) .venv-deepspeed/bin; do $$v/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"; done | \
	  { read -r below; read -r above; echo "$$below" > "$$above/below.pth"; }
	@.venv-deepspeed/bin/pip install --quiet --disable-pip-version-check -c configs/constraints.txt deepspeed
	@.venv-deepspeed/bin/python -m pytest tests/distributed/test_deepspeed.py

schema: $(STAMP)  ## Write peftcli/recipe/schema.json anew from the code.
	@$(BIN)/python scripts/write_schema.py

support: $(STAMP)  ## Write docs/methods.md anew from the tests that pass.
	@$(BIN)/python scripts/write_support.py

bench: model  ## Measure time and memory beside PEFT and TRL; PARTS="methods memory" for some of it.
	@test -x .venv-bench/bin/trl || { $(PYTHON) -m venv .venv-bench && \
	  .venv-bench/bin/pip install --quiet --disable-pip-version-check -c configs/constraints.txt "torch==2.13.0" peft "trl==1.16.0"; }
	@$(BIN)/python -m scripts.bench $(PARTS)

torture: $(STAMP)  ## Kill, starve and damage runs for an hour, and count what is lost; PARTS="kills faults" for some of it.
	@$(BIN)/python -m scripts.torture --long $(PARTS)

clean:  ## Remove the environment and what the tools left; the model's cache stays.
	rm -rf $(VENV) .venv-deepspeed .pytest_cache .mypy_cache .ruff_cache
