# `make demo` and `make test` set up what they need: one virtual environment, made once.
# constraints-cpu.txt pins the torch that was tested on CPUs; on Linux x86-64 the README says how to have its CPU build.
# With a GPU: make demo CONSTRAINT=
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo
CONSTRAINT ?= constraints-cpu.txt
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WITH := $(if $(CONSTRAINT),-c $(CONSTRAINT))

# What benchmark-accuracy works with: labelled h5ad files (benchmarks/README.md), a folder that is kept, tiny or whole.
DATA ?= data
WORK ?= accuracy
PLAN ?= whole
PEERS := singler celltypist cellcano scvi rainbow epianno

.PHONY: demo demo-full test test-slurm test-nodes lint bench benchmark-accuracy clean

demo: $(READY)
	$(BIN)/annatac demo --out $(OUT)

demo-full: $(READY)
	$(BIN)/annatac demo --full --out $(OUT)

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Needs Debian's packages slurm-wlm and munge; skips without them.
test-slurm: $(READY)
	$(BIN)/python -m pytest -m slurm

# Needs root and iproute2, for network namespaces; skips without them.
test-nodes: $(READY)
	$(BIN)/python -m pytest -m nodes

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/bench_road.py

# Every figure of docs/accuracy.md: some two hours with PLAN=tiny, else a night. Goes on where it was stopped.
# A peer whose environment cannot be made keeps a row that says why.
benchmark-accuracy: $(READY)
	-for peer in $(PEERS); do benchmarks/accuracy/peers/make_env.sh $$peer $(WORK)/envs; done
	$(BIN)/python benchmarks/accuracy/run.py --data $(DATA) --work $(WORK) --plan $(PLAN) --jobs 2
	$(BIN)/python benchmarks/accuracy/page.py --work $(WORK)

$(READY): pyproject.toml constraints-cpu.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "annatac_scale needs Python 3.11 or later: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[test,dev]' $(WITH)
	touch $(READY)

clean:
	rm -rf $(VENV) demo
