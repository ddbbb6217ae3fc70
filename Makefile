# Two commands: `make app` starts the demo, `make test` passes the test suite. Each does its own set-up.

PYTHON ?= python3
# A build for the CPU or for CUDA comes first, so that the requirements find a torch that suits the machine.
# Its words are those of pip's command line: TORCH="torch==2.13.0 --index-url URL".
TORCH ?= torch==2.13.0
export TORCH
VENV := .venv
BIN := $(VENV)/bin

.PHONY: app test test-long lint browser clean

app: $(VENV)/.installed
	$(BIN)/python app.py $(ARGS)

test: $(VENV)/.installed-dev browser
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n auto $(ARGS)

test-long: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto -m long $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(BIN)/python
	set -f; $(BIN)/python -m pip install --quiet $$TORCH
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

# The browser tests need a Chromium: any on the PATH will do, else Debian's is installed where that is allowed.
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
		{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq chromium; } || \
		{ echo "No Chromium found: install one (Debian: sudo apt install chromium) and run again."; exit 1; }

clean:
	rm -rf $(VENV)
