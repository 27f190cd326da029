# make demo: the whole path on one episode of Icons-FS.   make test: lint and tests.
# make node_modules/onnxruntime-web: what pages for browsers run on.   PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/installed
	$(BIN)/python demo.py

test: .venv/installed-dev lint
	$(BIN)/python -m pytest

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

node_modules/onnxruntime-web: common/runtimes/web.py
	npm install --no-save --no-audit --no-fund --ignore-scripts \
	    onnxruntime-web@$(shell sed -n 's/^VERSION = "\(.*\)".*/\1/p' $<)
	touch $@

clean:
	rm -rf .venv node_modules outputs
