# What a person and CI both run. The virtual environment is made once and again when the requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := lora_llava tools tests benchmarks

# llama.cpp as npm has it, for the CPU alone; the tests marked `node` ask it what it makes of exported files.
LLAMA_NODE := 1.7.15

.PHONY: quickstart node test fuzz torture mutants check bench gpu-check foreign foreign-short clean

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/lora-llava quickstart

.node/installed: Makefile
	npm install --silent --ignore-scripts --omit=optional --prefix .node \
		@fugood/llama.node@$(LLAMA_NODE) @fugood/node-llama-linux-x64@$(LLAMA_NODE)
	touch $@

node: .node/installed

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

# The short form of this is a part of the tests. The directories of models continue where an earlier run was stopped.
fuzz: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --hypothesis-profile=fuzz tests/fuzz
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --rounds 10000

# The short form of this, too. Runs are killed at twenty moments, and end as if nothing had happened.
torture: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --kills=20 tests/torture

# Which changes of the heart does no test see? The modules are named in pyproject.toml, the survivors in docs/mutants.md.
mutants: $(VENV)/installed
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,mutants]'
	rm -rf mutants
	OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children 2
	$(BIN)/mutmut results

check: $(VENV)/installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,trl]'
	$(BIN)/python -m benchmarks $(if $(SETS),--sets $(SETS) --no-ladder)

# What one look at a card tells, in eight minutes; without a GPU, the same in tiny form on the CPU.
gpu-check: $(VENV)/installed
	$(BIN)/python -m benchmarks.check --output gpu_check.json

# What other software makes of a tiny run, or of RUN=quickstart/run; LLAVA=DIR is a clone of the original LLaVA. Makes its
# environments in .foreign (8 GB). For CPU builds of PyTorch, set PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS.
foreign: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.foreign $(if $(RUN),--run $(RUN)) $(if $(LLAVA),--llava $(LLAVA))

foreign-short: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.foreign --short

# Not runs/: what is trained there may have cost days.
clean:
	rm -rf $(VENV) .node .foreign .fuzz mutants build dist *.egg-info quickstart
