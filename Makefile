# Linux, Python >= 3.11 with venv, a C++17 compiler. Everything lands in .venv. `make bench OVAM=DIR DAAM=DIR` times those too.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
CXX_FILES := $(filter %.h %.cpp %.cu,$(wildcard csrc/* tests/emulation/*))

.PHONY: help demo engine test test-fast lint format docs bench study validity scale gpu testbed clean

help:
	@echo "make demo     audit the embedded model and write runs/first/report.html"
	@echo "make engine   export the embedded model's UNet with its maps to engines/testbed"
	@echo "make test     the test suite"
	@echo "make test-fast the tests that take seconds, without the slow ones"
	@echo "make docs     tables and figures of README.md and docs/ from committed results"
	@echo "make lint     ruff, mypy --strict, clang-format"
	@echo "make bench    every benchmark, into benchmarks/results/, tables and figures (under 15 minutes)"
	@echo "make study    what guidance moves, and what an audit finds where the truth is known (two hours; goes on if stopped)"
	@echo "make scale    audits killed twenty times, profiled, on one and two workers (on an idle machine)"
	@echo "make validity train ten models and ask which overlap measure recovers their truth (hours)"
	@echo "make gpu      build, test, check and time the CUDA kernels on this machine's GPU; no network"
	@echo "make testbed  train the embedded model again (90 minutes of one idle core, THREADS=2: an hour of two; goes on if stopped)"

demo: $(VENV)/.installed
	$(BIN)/biasmap audit --model testbed --fraction 0.3 --fraction 0.1 --out runs/first

engine: engines/testbed/manifest.json

engines/testbed/manifest.json: | $(VENV)/.installed-onnx
	$(BIN)/python export/export_unet.py --model testbed --out engines/testbed

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow and not gpu"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(VENV)/.installed-onnx
	$(BIN)/python -m benchmarks.run $(if $(OVAM),--ovam $(OVAM)) $(if $(DAAM),--daam $(DAAM)); \
	status=$$?; $(BIN)/python -m docs.build && exit $$status

docs: $(VENV)/.installed
	$(BIN)/python -m docs.build

study: $(VENV)/.installed
	$(BIN)/python -m studies.guidance
	$(BIN)/python -m studies.audit
	$(BIN)/python -m docs.build

scale: $(VENV)/.installed-dev
	$(BIN)/python -m studies.kills --save
	$(BIN)/python -m benchmarks.cluster
	$(BIN)/python -m benchmarks.audit_profile
	$(BIN)/python -m benchmarks.audit_profile --part sd15
	$(BIN)/python -m docs.build

validity: $(VENV)/.installed
	$(BIN)/python -m studies.validity
	$(BIN)/python -m docs.build

# Not in the environment above: with the packages of a machine that has a GPU, and perhaps no network.
gpu:
	$(PYTHON) -m benchmarks.gpu $(if $(OUT),--out $(OUT))

testbed: $(VENV)/.installed
	$(BIN)/python -m training.train --out runs/testbed --threads $(or $(THREADS),1)

clean:
	rm -rf build $(VENV)

# The pin first: an open requirement of torch may bring gigabytes that nothing here needs.
$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[audit]"
	touch $@

$(VENV)/.installed-onnx: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[audit,onnx]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-onnx
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev
	touch $@
