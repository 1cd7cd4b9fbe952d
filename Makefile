SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-fast test-processes test-slurm lint format setup clean

# Options for the demo or for pytest: make demo ARGS="--seed 1", make test-fast ARGS="-k losses".
ARGS ?=
bin := .venv/bin
cores := $(shell nproc 2>/dev/null || echo 1)
num_launches := $(shell echo $$(( $(cores) < 2 ? 1 : 2 )))
# One worker per core, each with one thread.
num_workers := $(shell echo $$(( $(cores) < 8 ? $(cores) : 8 )))

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: setup ## Train a toy model with NFT on this host, from nothing; options in ARGS
	@$(bin)/megatron-nft demo $(ARGS)

test: setup ## Run every check: lint, the fast unit tests, then the tests that start processes
	@$(MAKE) --no-print-directory --keep-going lint test-fast test-processes

test-fast: setup ## Run the fast unit tests; pytest options in ARGS
	@OMP_NUM_THREADS=1 $(bin)/pytest -m "not processes and not slurm" -n $(num_workers) $(ARGS)

# Two files at a time, as launches are mostly imports, and then those that need the machine to
# themselves. pytest exits with 5 where it finds nothing to run, as with -k: no failure here.
test-processes: setup
	@status=0; \
	$(bin)/pytest -m "processes and not alone" -n $(num_launches) --dist loadfile $(ARGS) || status=$$?; \
	[[ $$status == 0 || $$status == 5 ]] || failed=1; status=0; \
	$(bin)/pytest -m "processes and alone" $(ARGS) || status=$$?; \
	[[ $$status == 0 || $$status == 5 ]] || failed=1; exit $${failed:-0}

test-slurm: setup ## Launch runs on a real Slurm of this machine's, which is installed where root may
	@launch/setup/slurm.sh
	@$(bin)/pytest -m slurm $(ARGS) || { status=$$?; [[ $$status == 5 ]] || exit $$status; }

lint: setup ## Check the code with ruff (rules, then formatting) and the Dockerfile with hadolint
	@status=0; \
	$(bin)/ruff check . || status=1; \
	$(bin)/ruff format --check . || status=1; \
	$(bin)/hadolint Dockerfile || status=1; \
	exit $$status

format: setup ## Format the code and repair what ruff can
	@$(bin)/ruff check --fix . || true
	@$(bin)/ruff format .

setup: ## Make .venv ready (the other targets do it themselves)
	@launch/setup/bootstrap.sh

clean: ## Remove caches and build outputs; .venv and runs/ stay
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	@find . -path './.venv*' -prune -o -path ./.bootstrap -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
