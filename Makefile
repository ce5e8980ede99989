# The commands a person types. PYTHON picks the interpreter of a new environment, VENV its folder.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-all faults gpu-test tensorflow-test parity bench-setup lint help

help:
	@echo 'make quickstart  train a small AFI network on handwritten digits, in a minute or two'
	@echo 'make test        the fast tests: two to three minutes on two free cores'
	@echo 'make test-all    all tests'
	@echo 'make faults      every fault for real, kills and damage and worse, and a table of how each ended'
	@echo 'make tensorflow-test VENV=.venv-tensorflow  what needs TensorFlow, which stays in VENV (3 GB)'
	@echo 'make parity      the networks against PyTorch and timm, in an environment of its own (5 GB)'
	@echo 'make bench-setup that environment alone: what the benchmarks compare with'
	@echo 'make gpu-test VENV=.venv-cuda  this GPU against this CPU, in an environment of its own'
	@echo 'make lint        ruff'

quickstart: $(VENV)/installed
	$(BIN)/python -m afi_flax.main --config configs/digits_afi_resnet20.py --workdir runs/quickstart

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n auto --dist loadfile -m 'not slow'

test-all: $(VENV)/installed-test
	$(BIN)/python -m pytest -n auto --dist loadfile --durations=25

faults: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --faults --faults_json results/faults.json -m fault

gpu-test: $(VENV)/installed-cuda
	AFI_FLAX_TEST_PLATFORMS=cuda,cpu $(BIN)/python -m pytest -m gpu tests/test_gpu.py

tensorflow-test: $(VENV)/installed-tensorflow
	$(BIN)/python -m pytest tests/interop/test_savedmodel.py tests/data/test_prepare.py

bench-setup:
	$(MAKE) --no-print-directory VENV=.venv-parity .venv-parity/installed-parity

parity: bench-setup
	.venv-parity/bin/python -m pytest -n 2 -m parity tests

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(BIN)/python:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 14) or sys.exit("error: Python %d.%d found, 3.11 to 3.13 needed; use make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

$(VENV)/installed-test: pyproject.toml $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

$(VENV)/installed-cuda: pyproject.toml $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[cuda]'
	touch $@

$(VENV)/installed-tensorflow: pyproject.toml $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[tensorflow]'
	touch $@

# === keeps pip from taking a +cpu build, beside which torchvision does not load.
$(VENV)/installed-parity: pyproject.toml $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'torch===2.13.0' -e '.[parity]'
	touch $@
