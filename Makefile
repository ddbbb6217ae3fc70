# Two commands: `make app` starts the demo, `make test` passes the test suite. Each does its own set-up.
# `make test-lowest` passes it on the oldest libraries that are allowed, `make test-long` passes what takes minutes.

PYTHON ?= python3
# A build for the CPU or for CUDA comes first, so that the requirements find a torch that suits the machine.
# Its words are those of pip's command line: TORCH="torch==2.13.0 --index-url URL".
TORCH ?= torch==2.13.0
export TORCH
VENV := .venv
BIN := $(VENV)/bin

LOWEST := .venv-lowest

.PHONY: app test test-long test-lowest lint browser clean

app: $(VENV)/.installed
	$(BIN)/python app.py $(ARGS)

test: $(VENV)/.installed-dev browser
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n auto $(ARGS)

test-long: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto -m long $(ARGS)

# The same suite, without the browser, on the lowest versions that requirements.txt allows.
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest -n auto --ignore tests/browser $(ARGS)

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

$(LOWEST)/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(LOWEST)
	sed -E 's/>=([0-9.]+)(,<[0-9]+)?/==\1/' requirements.txt > $(LOWEST)/lowest.txt
	grep -v '^-r' requirements-dev.txt > $(LOWEST)/dev.txt
	$(LOWEST)/bin/python -m pip install --quiet -r $(LOWEST)/lowest.txt -r $(LOWEST)/dev.txt
	touch $@

# The browser tests need a Chromium: any on the PATH will do, else Debian's is installed where that is allowed.
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
		{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq chromium; } || \
		{ echo "No Chromium found: install one (Debian: sudo apt install chromium) and run again."; exit 1; }

clean:
	rm -rf $(VENV) $(LOWEST)
