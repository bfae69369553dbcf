# Each target sets up what it needs (.ci/setup: .venv, vLLM, Ray) and may be the first one run.
SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help serve test test-long cluster-test check format schema bench scale peers clean

CONFIG := configs/local.yaml
PORT :=
HOST :=
ARGS :=

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

# `exec`, so that Ctrl-C and SIGTERM reach headrace itself and not a shell around it. PORT and HOST set to nothing
# above keep variables of the environment out: compilers' environments export a HOST that is no address.
serve: ## serve a model: make serve [CONFIG=configs/local.yaml] [HOST=127.0.0.1] [PORT=8000] [ARGS=...]
	@.ci/setup && exec .venv/bin/headrace serve $(CONFIG) \
	    $(if $(HOST),--host $(HOST)) $(if $(PORT),--port $(PORT)) $(ARGS)

test: ## run the tests, real vLLM replicas included (about 20 minutes): make test [ARGS="-m 'not vllm'"]
	@.ci/setup && exec .venv/bin/pytest -m "not long and not netns" $(ARGS)

test-long: ## run the rest: quotas, rollouts, scaling and Ray Serve on Ray and on real replicas (about 25 minutes)
	@.ci/setup && exec .venv/bin/pytest -m "long and not netns" $(ARGS)

cluster-test: ## lose nodes of a Ray cluster of three network namespaces; needs root (about 7 minutes)
	@.ci/setup && exec .venv/bin/pytest -m netns tests/netns $(ARGS)

check: ## lint, formatting, types, import rules
	@.ci/setup dev-only
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports

format: ## rewrite what ruff can
	@.ci/setup dev-only
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

schema: ## write configs/schema.json again after the configuration changed
	@.ci/setup dev-only
	.venv/bin/headrace config schema > configs/schema.json

bench: ## measure the relay beside its peers; writes bench/results/relay.md: make bench [ARGS=--quick]
	@.ci/setup && exec .venv/bin/python -m headrace_bench.relay $(ARGS)

scale: ## 256 simulated replicas, four gateways, 5,000 streams; writes bench/results/scale_test.md (5 minutes)
	@.ci/setup && exec .venv/bin/python -m headrace_bench.scale_test $(ARGS)

peers: ## install the peers that `make bench` compares with, each in its own environment under .peers/
	@.ci/setup && exec .venv/bin/python -m headrace_bench.peers install

clean: ## remove .venv and caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
