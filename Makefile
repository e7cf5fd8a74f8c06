# Needs python3 (>= 3.11) and make; everything else goes into .venv from pinned, hashed versions.
PYTHON ?= python3
BIN := .venv/bin
# Torch and transformers are references only: never in the lock, never needed by `make test`. libtpu
# is the compiler for TPUs, in the version that the locked jax was made for.
REFERENCES ?= torch==2.13.0 transformers==5.23.0 \
	"libtpu==0.0.42.1 ; python_version < '3.12' and sys_platform == 'linux'" \
	"libtpu==0.0.50.1 ; python_version >= '3.12' and sys_platform == 'linux'"
# Built from source (minutes, a C++ compiler); without it the tests against llama.cpp are skipped.
LLAMA_CPP ?= llama-cpp-python==0.3.36

.PHONY: demo test test-parity test-all lint bench clean

demo: .venv/.installed
	$(BIN)/python main.py demo

test: .venv/.installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-parity: .venv/.references
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m parity

test-all: .venv/.llama_cpp
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "slow or parity or not slow"

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.llama_cpp
	$(BIN)/python benchmarks/train_cpu.py
	$(BIN)/python benchmarks/generate_cpu.py
	$(BIN)/python benchmarks/generate_cpu.py --continuous

.venv/.installed: requirements/dev.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llama_jax needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --require-hashes -r requirements/dev.lock
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

.venv/.references: .venv/.installed
	$(BIN)/pip install -q --disable-pip-version-check $(REFERENCES)
	@touch $@

.venv/.llama_cpp: .venv/.references
	$(BIN)/pip install -q --disable-pip-version-check $(LLAMA_CPP)
	@touch $@

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
