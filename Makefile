# make demo: a real model quantized, evaluated, shown. make test: every check. Both share one virtual environment.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
MODEL  ?=
BIN    := $(VENV)/bin
# Large buffers are reused instead of mapped anew at every operation: CPU tensors fill several times faster.
RUN    := GLIBC_TUNABLES=glibc.malloc.hugetlb=1 TOKENIZERS_PARALLELISM=false

.PHONY: help venv demo test lint bench clean
help:
	@echo "make demo              quantize SmolLM2-135M to MXFP4 with BATQuant, compare with float and RTN, write a report"
	@echo "make demo MODEL=...    the same for a model folder or a name on the hub"
	@echo "make test              linters, types, layers, all tests"
	@echo "make bench             timings against a plain copy and an eager reference"
	@echo "make venv              only the environment of the demo"
	@echo "make clean             remove the environment and what the demo wrote"
	@echo "PYTHON=python3.12, VENV=folder and TORCH='torch==2.13.0' choose the interpreter, the environment and torch"

venv: $(VENV)/demo.stamp

demo: $(VENV)/demo.stamp
	@MODEL="$(MODEL)" $(RUN) $(BIN)/python examples/demo.py

# All checks run even when an early one fails; the first failure is the exit status. A process of one thread for each core.
test: $(VENV)/test.stamp
	@status=0; $(MAKE) --no-print-directory lint || status=$$?; \
	$(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -n auto --maxprocesses=8 --durations=10 || { failed=$$?; [ $$status -ne 0 ] || status=$$failed; }; \
	exit $$status

lint: $(VENV)/test.stamp
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports
	@$(BIN)/mypy

bench: $(VENV)/test.stamp
	@$(RUN) $(BIN)/python benchmarks/fake_quantize.py
	@$(RUN) $(BIN)/python benchmarks/packed_product.py
	@$(RUN) $(BIN)/python benchmarks/calibration_step.py
	@$(RUN) $(BIN)/python benchmarks/scale_search.py

$(VENV)/torch.stamp:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("microbat needs Python 3.11 or newer, not " \
		+ sys.version.split()[0] + "; choose one with make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --upgrade pip
	@echo "installing $(TORCH)"
	@$(BIN)/pip install --quiet "$(TORCH)"
	@touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml
	@echo "installing microbat[demo]"
	@$(BIN)/pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	@echo "installing microbat[demo,test]"
	@$(BIN)/pip install --quiet --editable '.[demo,test]'
	@touch $@

clean:
	rm -rf $(VENV) microbat-demo
