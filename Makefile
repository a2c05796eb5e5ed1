# Everything runs in .venv, which `make venv` creates and keeps as long as pyproject.toml and constraints.txt stay the same.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo test versions fuzz sanitize lint types bench docs clean

help:
	@echo "make demo | test | versions | fuzz | lint | bench | docs | venv | clean"

venv: $(STAMP)

# torch comes first and alone: asked for by another package, pip may take a CUDA build of several gigabytes.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(shell grep '^torch==' constraints.txt)
	rm -rf torch_fuse.egg-info  # of an earlier installation: from this folder, Python would read its entry points
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: venv
	$(BIN)/python examples/quickstart.py

# Workers share the cores: threads of their own would wait for each other, spinning. Who has done his half takes from the others.
test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# What another torch or Python can break, in environments of their own under build/versions; some gigabytes each.
versions:
	$(PYTHON) tests/versions.py

# 10,000 new random programs; what fails is printed as Python that runs. The same again: make fuzz SEED=…
SEED := $(or $(SEED),$(shell date +%s))
fuzz: venv
	@echo "SEED=$(SEED)"
	OMP_NUM_THREADS=1 FUSE_FUZZ=deep FUSE_FUZZ_SEED=$(SEED) $(BIN)/python -m pytest -n auto --dist worksteal tests/test_fuzz.py

# C++ kernels that gcc watches: a read or write beside an operand, or what C++ does not define, ends the process of its test.
# The compiler itself is not watched: it would take a third longer.
sanitize: venv
	LD_PRELOAD=$(shell gcc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 FUSE_TEST_SANITIZE=1 \
	CXX="env -u LD_PRELOAD g++" FUSE_TEST_CACHE=build/sanitized OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal \
	tests/test_cpp.py tests/test_cpp_backward.py tests/test_cpp_bf16.py tests/test_cpp_dropout.py tests/test_cpp_shapes.py

lint: venv types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy looks modules up by folder: links show it fuse as it is installed, with passes/ and templates/ inside.
types: venv
	rm -rf build/types && mkdir -p build/types/fuse
	ln -s $(CURDIR)/fuse/* $(CURDIR)/passes $(CURDIR)/templates build/types/fuse/
	ln -s $(CURDIR)/torch_fuse_logs.py build/types/
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../.mypy_cache -p fuse -m torch_fuse_logs

# The pages under build/docs: open build/docs/index.html. The variable silences what its authors say of their next project.
docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: venv
	$(BIN)/python benchmarks/cpu_forward.py
	$(BIN)/python benchmarks/cpu_backward.py
	$(BIN)/python benchmarks/masks.py
	$(BIN)/python benchmarks/varlen.py
	$(BIN)/python benchmarks/cpu_small.py
	$(BIN)/python benchmarks/never_slower.py
	$(BIN)/python benchmarks/cpu_memory.py
	$(BIN)/python benchmarks/compile_time.py

clean:
	rm -rf build dist .venv *.egg-info
