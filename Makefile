# Everything runs in .venv, made on first use. `make help` lists what there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CACHE := $(or $(TRAINMERGE_CACHE),$(HOME)/.cache/trainmerge)
ONLY ?= all

export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help setup data data-suite data-lm data-embed data-vision demo test fuzz test-processors families lower-bounds lint suite suite-lm suite-heads suite-embed suite-vision suite-closed bench gpu gpu-wheels tables docs soak cases lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 18

$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV)" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' >&2
	@touch $@

setup: $(READY) ## make .venv with the package and its tools

data: $(READY) ## fetch the base model and the demo's texts (148 MB, once)
	@$(BIN)/python data/texts.py --tasks demo
	@ln -sfn $(CACHE) data/cache

data-suite: $(READY) ## fetch the full suite's texts and train its eight experts (once)
	@$(BIN)/python data/texts.py --tasks suite
	@ln -sfn $(CACHE) data/cache
	@$(BIN)/python data/train_experts.py --kind full --tasks suite

data-lm: $(READY) ## fetch SmolLM2 and four domains' documents, train three experts (once)
	@$(BIN)/python data/lm_texts.py
	@ln -sfn $(CACHE) data/cache
	@$(BIN)/python data/train_lm_experts.py

data-embed: data ## train three sentence embedders of MiniLM and write their pairs (once, 4 minutes)
	@$(BIN)/python data/train_embedders.py
	@ln -sfn $(CACHE) data/cache

data-vision: $(READY) ## fetch DINOv2, Fashion-MNIST and digits, train four experts (once)
	@ln -sfn $(CACHE) data/cache
	@$(BIN)/python data/train_pictures.py

demo: data ## learn a merge of five experts, resume it, export it, score it, draw it
	@rm -rf runs/demo
	$(BIN)/trainmerge fit configs/demo.yaml runs/demo --no-report --trainer.max-steps 40
	$(BIN)/trainmerge fit configs/demo.yaml runs/demo --no-report
	$(BIN)/trainmerge export runs/demo runs/demo/merged --verify
	$(BIN)/trainmerge evaluate runs/demo
	$(BIN)/trainmerge report runs/demo

test: data ## run the tests, one process per core
	@$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

fuzz: $(READY) ## 100,000 mutated files at every door: SECONDS per door, ONLY some of the doors (hours)
	@$(BIN)/python -m tests.fuzz --seconds "$(or $(SECONDS),3600)" --only "$(filter-out all,$(ONLY))"

test-processors: $(READY) ## the tests as other processors, with other threads, on a busy machine (hours)
	@$(BIN)/python -m tests.processors --only "$(SETTING)"

families: $(READY) ## every family of models: gradients against autograd, and files to files; FAMILY=mamba for one
	@$(BIN)/python -m tests.gradient_sweep --only "$(FAMILY)" $(if $(FAMILY),,--keep tests/results/gradients.json)
	@$(BIN)/python -m tests.family_table --only "$(FAMILY)"

lower-bounds: ## install the oldest dependencies that pyproject.toml promises, run the quick tests with them
	@$(PYTHON) -m tests.lower_bounds

lint: $(READY) ## format, lint and type-check
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

suite: data-suite ## the full text suite: fits, scores, the table of the documentation (hours)
	@$(BIN)/python -m tests.suite
	@$(BIN)/python -m tests.result_tables

suite-lm: data-lm ## Expert Merging on a language model: fits, scores, tables (hours)
	@$(BIN)/python -m tests.lm_suite
	@$(BIN)/python -m tests.result_tables

suite-embed: data-embed ## merges of sentence embedders: fits, scores, table (half an hour)
	@$(BIN)/python -m tests.embed_suite
	@$(BIN)/python -m tests.result_tables

suite-heads: data ## classifiers with heads of their own: trained here, merged, scored (an hour and a half)
	@$(BIN)/python data/texts.py --tasks suite
	@$(BIN)/python -m tests.head_suite
	@$(BIN)/python -m tests.result_tables

suite-closed: suite suite-lm ## every merge without learning, and learning from the best, on both (hours)
	@$(BIN)/python -m tests.closed_suite
	@$(BIN)/python -m tests.result_tables

suite-vision: data-vision ## AdaMerging and ours on pictures: fits, scores, the table (an hour)
	@$(BIN)/python -m tests.vision_suite
	@$(BIN)/python -m tests.result_tables

bench: data ## measure; ONLY=fit_memory, ... for one group; KEEP="machine" writes tests/results/bench
	@$(BIN)/python -m tests.bench --only $(ONLY) $(if $(KEEP),--keep "$(KEEP)")

gpu: ## everything that needs a GPU, on a machine with one: PYTHON has torch and triton, WHEELS what it lacks
	@$(PYTHON) -m tests.gpu $(if $(WHEELS),--wheels "$(WHEELS)")

gpu-wheels: $(READY) ## fetch the wheels for a GPU machine without a network into the folder WHEELS
	@$(BIN)/python -m tests.gpu.packages "$(or $(WHEELS),build/wheels)"

tables: $(READY) ## write the tables of tests/results into README and the documentation
	@$(BIN)/python -m tests.result_tables

docs: $(READY) ## build the pages of notebooks/docs into build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --config-file notebooks/mkdocs.yml

soak: $(READY) ## kill and resume for SOAK_MINUTES (20) on two processes; then every command, KILLS times (200)
	@$(BIN)/python -m tests.soak
	@$(BIN)/python -m tests.kills

cases: data ## run every script in the folder CASES, and list what each says
	@$(BIN)/python -m tests.cases "$(CASES)"

lock: $(READY) ## write requirements.lock from the installed packages
	@$(BIN)/python -m tests.lock

clean: ## remove the demo's run and caches of tools; other runs, downloads and .venv stay
	@rm -rf runs/demo .mypy_cache .ruff_cache .pytest_cache
