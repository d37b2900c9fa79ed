# Every target makes what it needs: a fresh clone with Python >= 3.11 and make is enough. `make` alone lists the targets.
# Variables: PYTHON=/path/to/python3   the interpreter of .venv (default: the first >= 3.11 that is found)
#            PY=3.13                   run a target on another interpreter, in its own .venv-3.13
#            ARGS='-k upload -x'       passed on to pytest or devstack
#            PARALLEL=1                how many processes run `make test`, each with servers of its own (default: 2)
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

PY ?=
PYTHON ?= $(PY)
VENV := .venv$(if $(PY),-$(PY))
BIN := $(VENV)/bin
READY := $(VENV)/.ready
STAGE ?= 4
ARGS ?=
PARALLEL ?= 2
IMAGE ?= tenfold
SERVICES := $(patsubst services/%/app.py,%,$(wildcard services/*/app.py))
COMPOSE := docker compose
LOCK := $(VENV)/.uv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" $(if $(UPGRADE),--upgrade)

##@ Run
.PHONY: dev
dev: $(READY) ## Run the platform here, without Docker (STAGE=1..4)
	@exec $(BIN)/python -m devstack --stage $(STAGE) $(ARGS)

.PHONY: up
up: .env ## Build the images and run the platform in Docker Compose
	@$(COMPOSE) up --build --detach --wait
	@echo "http://$$($(COMPOSE) port balancer 8080)  the platform"
	@echo "http://$$($(COMPOSE) port mailpit 8025)  the mail it sent"
	@echo "make down stops it and keeps the data; make down VOLUMES=1 removes the data too"

.PHONY: down
down: .env ## Stop what `make up` started (VOLUMES=1 removes its data too)
	@$(COMPOSE) down --remove-orphans $(if $(VOLUMES),--volumes)

.PHONY: images
images: ## Build one container image a service (IMAGE=tenfold TAG=dev)
	@for service in $(SERVICES); do docker build --build-arg SERVICE=$$service --tag $(IMAGE)/$$service:$${TAG:-dev} .; done

##@ Test
.PHONY: test
test: $(READY) ## Run every test on real parts (no Docker needed; PARALLEL=1: one after the other, ARGS=-s shows figures)
	@$(BIN)/python -m pytest $(if $(filter-out 1,$(PARALLEL)),-n $(PARALLEL) --dist loadfile) $(ARGS)

.PHONY: test-unit
test-unit: $(READY) ## Run the tests that do no I/O
	@$(BIN)/python -m pytest tests/unit $(ARGS)

.PHONY: test-contract
test-contract: $(READY) ## Run the tests of event schemas, API documents and the Helm chart
	@$(BIN)/python -m pytest tests/contract $(ARGS)

.PHONY: test-integration
test-integration: $(READY) ## Run repositories and the event path on real parts (BACKING=containers: testcontainers)
	@$(BIN)/python -m pytest tests/integration $(ARGS)

.PHONY: test-e2e
test-e2e: $(READY) ## Run the whole flow through the gateway
	@$(BIN)/python -m pytest tests/e2e $(ARGS)

.PHONY: test-chaos
test-chaos: $(READY) ## Run the slow faults: brokers frozen for a minute, rolling restarts, failover
	@$(BIN)/python -m pytest tests/chaos -s $(ARGS)

##@ Check
.PHONY: check
check: lint types test-fast lint-sql lint-infra ## Run all gates: lint, types, fast tests, infrastructure files

.PHONY: lint
lint: $(READY) ## Check style, formatting and the import contracts
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "Not formatted: run make format" >&2; $(BIN)/ruff format --diff --quiet .; exit 1; }
	@$(BIN)/lint-imports --no-cache | tail -n 2

.PHONY: types
types: $(READY) ## Check types (mypy --strict)
	@$(BIN)/mypy

.PHONY: test-fast
test-fast: $(READY) # unit and contract tests in one run
	@$(BIN)/python -m pytest tests/unit tests/contract $(ARGS)

.PHONY: lint-infra
lint-infra: ## Check shell scripts, workflows, Compose, HAProxy and the chart with the tools that are there
	@scripts/lint-infra.sh

.PHONY: lint-sql
lint-sql: $(READY) ## Check that migrations do not stop the traffic (squawk; .squawk.toml says which rules)
	@$(BIN)/squawk shared/migrations/*.sql services/*/migrations/*.sql

.PHONY: format
format: $(READY) ## Format the code and mend what ruff can mend
	@$(BIN)/ruff check --fix --exit-zero --quiet .
	@$(BIN)/ruff format --quiet .

##@ Grow
.PHONY: service
service: $(READY) ## Add a service of your own: make service NAME=orders [ITEM=order]
	@$(BIN)/python scripts/new_service.py $(NAME) $(ITEM)

##@ Maintain
.PHONY: lock
lock: $(READY) ## Lock the dependencies with hashes (UPGRADE=1 takes newer ones)
	@$(LOCK) pyproject.toml -o requirements.lock
	@$(LOCK) pyproject.toml --group dev -o requirements-dev.lock
	@echo uv | $(LOCK) --no-annotate - -o requirements-uv.lock

.PHONY: tools
tools: ## Build the pinned helm and actionlint from source (needs Go; cached outside the repository)
	@scripts/tools.sh

.PHONY: clean
clean: ## Remove environments, caches and the data of `make dev`
	@rm -rf .venv .venv-* .devstack .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

.PHONY: help
help: ## Show this help
	@awk 'BEGIN { FS = ":.*## " } \
		/^##@ / { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z0-9-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# The stamp is written last, so an installation that failed or was interrupted is resumed by the next make.
$(READY): requirements-dev.lock requirements-uv.lock scripts/venv.sh
	@scripts/venv.sh $(VENV) $(PYTHON)
	@touch $@

# Random secrets for this machine's Compose project; never committed.
.env: scripts/compose-env.sh
	@scripts/compose-env.sh $@

##@ Plan
.PHONY: plan
plan: $(READY) ## Do the connections fit the server? (REPLICAS=8 POOL=10 SURGE=1 MAX_CONNECTIONS=100 RESERVE=10 CORES=2)
	@$(BIN)/python -m shared.budget --replicas $(or $(REPLICAS),8) --pool $(or $(POOL),10) --surge $(or $(SURGE),1) \
		--max-connections $(or $(MAX_CONNECTIONS),100) --reserve $(or $(RESERVE),10) --cores $(or $(CORES),2)

##@ Measure
.PHONY: bench-data
bench-data: $(READY) ## Compare Loader, group commit and Redis with the plain drivers and pgbench
	@$(BIN)/python -m bench.data

.PHONY: bench-events
bench-events: $(READY) ## Measure the event path against aiokafka itself
	@$(BIN)/python -m bench.events

.PHONY: bench-campaign
bench-campaign: $(READY) ## Send a campaign to 100,000 and compare with the mail sink's limit (RECIPIENTS=n WORKERS=n)
	@$(BIN)/python -m bench.campaign

.PHONY: bench-media
bench-media: $(READY) ## Measure the images: CPU, bytes, likeness, memory, against vipsthumbnail and Pillow
	@PYTHON=$(PYTHON) bench/setup.sh media
	@$(BIN)/python -m bench.media

.PHONY: bench-login
bench-login: $(READY) ## Does the time of a refused login or reset tell whether there is such an account?
	@$(BIN)/python -m bench.login_timing $(ARGS)

.PHONY: bench-gateway
bench-gateway: $(READY) ## Measure the gateway beside nginx and plain proxies (bench/results/gateway.md)
	@PYTHON=$(PYTHON) bench/setup.sh gateway
	@PYTHONPATH=. $(VENV)/bin/python bench/gateway.py
