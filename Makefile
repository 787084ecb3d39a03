# Everything that can be done with this tree; plain pip and Python 3.11 to 3.13 are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODELS ?= models
INSTALLED := $(VENV)/.installed
ENGINE ?= docker
VARIANT ?= cpu
EXTRAS ?=
BAKE ?=
MINUTES ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup serve test lint type protos observe-test dashboards bench bench-codecs bench-plans load simulate simulate-live overload many-models models image image-test chart

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*##/  make \1  #/p' $(MAKEFILE_LIST) | column -t -s '#'

setup: $(INSTALLED)  ## make .venv with exactly the packages of constraints.txt, and Kiln in it

$(INSTALLED): constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and "Python 3.11 to 3.13 is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -m compileall -q service  # also where the environment forbids Python to keep bytecode: starts take less
	touch $@

serve: setup  ## serve the example models: REST on 8501, gRPC on 8500
	$(BIN)/kiln serve $(MODELS)

test: setup lint type  ## run every check and every test
	$(BIN)/python protos/generate.py --check
	$(BIN)/python -m pytest --cov --cov-report=term --cov-fail-under=95

lint: setup  ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: setup  ## mypy, strict
	$(BIN)/mypy

protos: setup  ## regenerate service/rpc/_generated from protos/
	$(BIN)/python protos/generate.py

observe-test: setup  ## scrape a server with a real Prometheus: metrics, rules, alerts, dashboards (needs prometheus)
	$(BIN)/python -m pytest tests/e2e/test_observe.py tests/unit/test_dashboards.py

dashboards: setup  ## write helm/dashboards/*.json, and the README's picture of one (needs prometheus)
	$(BIN)/python helm/dashboards/make.py
	$(BIN)/python -m load_tests.dashboard docs/dashboard.svg

bench: setup  ## measure the server and print the table of load_tests/README.md
	$(BIN)/python -m load_tests.bench

many-models: setup  ## 200 models, one of them hot: memory, idle CPU, what the hot one answers; JSON in load_tests/results/
	$(BIN)/python -m load_tests.many_models

bench-codecs: setup  ## measure the codecs alone: each dialect, form, type and size
	$(BIN)/python -m load_tests.bench_codecs

bench-plans: setup  ## measure the execution plans of eight models against each other
	$(BIN)/python -m load_tests.bench_plans --json load_tests/results/plans.json --plot load_tests/results/plans.svg

load: setup  ## start the server, ask it with Locust's users for a short while, write load_tests/results/load.html
	$(BIN)/python -m load_tests.load --models $(MODELS)

simulate: setup  ## compare ways to batch on made-up arrivals: table, JSON and plot in load_tests/results/
	$(BIN)/python -m load_tests.simulate

simulate-live: setup  ## the same on the real server, for two of the traces (half an hour)
	$(BIN)/python -m load_tests.live --out load_tests/results/live.json --table load_tests/README.md

overload: setup  ## offer ten times what the server can do: goodput, p99, memory, recovery (MINUTES=10)
	$(BIN)/python -m load_tests.overload --minutes $(MINUTES) --out load_tests/results/overload.json --table load_tests/README.md

models: setup  ## train all example models anew
	set -e; for script in models/*/train.py; do echo "$$script"; $(BIN)/python "$$script"; done

image:  ## build the container image: VARIANT=cpu or gpu, EXTRAS="s3 otel", BAKE=models, ENGINE=docker
	$(ENGINE) build --tag kiln --build-arg VARIANT=$(VARIANT) --build-arg EXTRAS="$(EXTRAS)" --build-arg MODELS=$(BAKE) \
	  --build-arg REVISION=$$(git rev-parse HEAD) --build-arg CREATED=$$(date -u +%Y-%m-%dT%H:%M:%SZ) .

image-test: setup  ## build the image without an engine, start it and call it (needs root, buildah and debootstrap)
	KILN_IMAGE_TEST=1 $(BIN)/python -m pytest -s tests/e2e/test_image.py tests/e2e/test_docker_and_chart.py

chart: setup  ## check the Helm chart: lint, schemas, its suites, and a pod's life as it says; fetches helm if need be
	$(BIN)/python -m helm.tools
	$(BIN)/python -m helm.generate --check
	$(BIN)/python -m pytest tests/e2e/test_chart.py tests/e2e/test_pod.py
