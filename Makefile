# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
QUICKSTART := examples/quickstart/model-compose.yml

.PHONY: quickstart up test test-fast test-shuffled test-vllm test-llamacpp test-llama-server lint graph docs reference recording package train measure clean

quickstart: .venv/installed  ## Install, fetch the weights, print a blended answer
	$(BIN)/model-compose run -f $(QUICKSTART) --input '{"prompt": "Why do people read books?"}'

up: .venv/installed  ## Serve the quickstart: API on 8080, page on 8081
	$(BIN)/model-compose up -f $(QUICKSTART)

test: .venv/docs lint  ## Everything: install, ruff, mypy, the rules for imports, every test
	$(BIN)/python -m pytest -q

test-fast: .venv/dev  ## Every test but the slow ones
	$(BIN)/python -m pytest -q -m "not slow"

test-shuffled: .venv/dev  ## Every test, in an order of its own each time: none may lean on another
	$(BIN)/python -m pytest -q -p randomly

test-vllm: .venv/dev  ## Installs vLLM beside this, and runs what every engine must pass with it
	MODEL_COMPOSE_VLLM_PYTHON=$$($(BIN)/model-compose setup vllm --folder .venv-vllm) \
		$(BIN)/python -m pytest -q tests/contracts tests/engines/test_real_vllm.py -k vllm

test-llamacpp: .venv/dev  ## What every driver promises, with llama.cpp too: compiles it first, some 8 minutes
	$(PIP) --editable '.[llamacpp]'
	$(BIN)/python -m pytest -q tests/contracts tests/lora/test_gguf.py tests/engines/test_llamacpp.py

test-llama-server: .venv/dev  ## What every driver promises, on LLAMA_SERVER=/path/to/llama-server
	MODEL_COMPOSE_LLAMA_SERVER=$(abspath $(LLAMA_SERVER)) \
		$(BIN)/python -m pytest -q tests/contracts tests/engines/test_llama_server.py -k server

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

graph: .venv/dev  ## Print which package imports which, and check the rules for imports in pyproject.toml
	$(BIN)/import-linter drawgraph model_compose --show-import-totals
	$(BIN)/lint-imports --no-logo

docs: .venv/docs  ## Build docs/_build, where a warning is an error, and check the links of every Markdown file
	$(BIN)/sphinx-build --quiet --fresh-env --fail-on-warning --keep-going docs docs/_build
	$(BIN)/python -m docs.links

reference: .venv/dev  ## Write docs/reference/ from the code
	$(BIN)/python -m docs.generate

recording: .venv/installed  ## Record docs/images/terminal.svg: real commands, on a service of the quickstart
	test -d .venv-recording || $(PYTHON) -m venv .venv-recording
	.venv-recording/bin/pip install --quiet --disable-pip-version-check asciinema==2.4.0 termtosvg==1.1.0
	$(BIN)/model-compose up --detach -f $(QUICKSTART)
	PATH=$(abspath $(BIN)):$$PATH .venv-recording/bin/asciinema rec --quiet --overwrite --cols 92 --rows 22 \
		--idle-time-limit 1 --command 'bash docs/recording.sh' .venv-recording/terminal.cast </dev/null
	$(BIN)/model-compose down -f $(QUICKSTART)
	.venv-recording/bin/termtosvg render .venv-recording/terminal.cast docs/images/terminal.svg -m 40 -M 1500 -t window_frame

package: .venv/dev  ## Build the release into dist/, install its wheel into a fresh environment, and run the quickstart there
	PYTHON=$(PYTHON) .ci/package

train: .venv/dev  ## Train the quickstart's adapters again
	$(BIN)/python examples/quickstart/train.py

measure: .venv/installed  ## What each weight of the quickstart does
	$(BIN)/python examples/quickstart/measure.py

# torch comes first and alone: another package's range might pull a build for CUDA.
.venv/installed: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable .
	touch $@

.venv/dev: .venv/installed
	$(PIP) --editable '.[dev]'
	touch $@

.venv/docs: .venv/dev
	$(PIP) --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv .venv-vllm .venv-recording docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache .grimp_cache dist
