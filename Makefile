# On a fresh machine with Python and a C++ compiler `make demo` and `make test` do all their own set-up in .venv.
# torch comes from where pip is told to look: its variables (PIP_INDEX_URL, PIP_FIND_LINKS) can name a source of a build
# for CPU only, where the default would be a large one for CUDA.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
CSRC := $(wildcard csrc/*.[ch]* csrc/*/*.[ch]*)
EMULATION := $(wildcard tests/emulation/*.h tests/emulation/*.cu)

# As `make help` shows them: what a newcomer wants first, then what a change needs, then the rest.
COMMANDS := help demo test bench bench-sigmoid demo-detection study venv lint format docs test-full test-emulated mutants gpu-check triton-versions wheel clean
.PHONY: $(COMMANDS)

help:  ## show this list
	@for name in $(COMMANDS); do \
	    printf "  make %-16s %s\n" $$name "$$(sed -n "s/^$$name:.*## //p" $(firstword $(MAKEFILE_LIST)))"; \
	done

# Three stamps, so that a repeated call costs nothing and a change redoes only what it must.
$(VENV)/.packages: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch setuptools ninja
	rm -rf build  # objects compiled for another torch
	touch $@

# Beside .venv's own Triton, which is the one of its torch: the oldest version that is supported, the first with clusters
# and the newest, where tests/test_triton_compile.py looks for them (and leaves out what it does not find). Each is a
# gigabyte.
TRITON_VERSIONS := 3.6.0 3.8.0 3.9.0
triton-versions: $(VENV)/.triton  ## install more versions of Triton, which the tests then compile with
$(VENV)/.triton: $(VENV)/.packages
	for version in $(TRITON_VERSIONS); do \
	    test -d $(VENV)/triton/$$version || \
	        $(PIP) install -q --no-deps --target $(VENV)/triton/$$version triton==$$version || exit 1; \
	done
	touch $@

# The extension is left to the next step, because pip compiles in a temporary directory: from the start, every time.
$(VENV)/.installed: $(VENV)/.packages pyproject.toml
	IMBALANCE_KERNELS_BUILD=0 $(PIP) install -c constraints.txt --no-build-isolation -e '.[test,demo,bench,dev]'
	touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(CSRC)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) setup.py --quiet build_ext --inplace
	touch $@

venv: $(VENV)/.built  ## create .venv: pinned packages, this one editable, the extension compiled

PYTEST_ARGS := -n auto --maxprocesses 8 --durations=10
test: venv  ## run the tests (TEST_ARGS="-k focal")
	$(PY) -m pytest -q $(PYTEST_ARGS) $(TEST_ARGS)
	$(if $(TEST_ARGS),,$(MAKE) test-emulated)

test-emulated: venv  ## run the tables of tests with the CUDA kernels on the CPU (needs nvcc, for its headers)
	PYTHONPATH=tests $(PY) -m emulation.tables $(VENV)/emulated.so $(PYTEST_ARGS)

test-full: venv  ## run the tests on many more random cases
	$(PY) -m pytest -q $(PYTEST_ARGS) --hypothesis-profile=full $(TEST_ARGS)

demo: venv  ## run the demo (DEMO_ARGS="--data FOLDER")
	$(PY) examples/demo.py $(DEMO_ARGS)

demo-detection: venv  ## train a small detector with three losses (DEMO_ARGS="--steps 100")
	$(PY) examples/detection.py $(DEMO_ARGS)

study: venv  ## make the runs of the long-tail study that are missing, and docs/study.md (STUDY_ARGS="--report")
	$(PY) examples/long_tail_study.py $(STUDY_ARGS)

bench: venv  ## run the benchmark of the softmax losses (BENCH_ARGS="...")
	$(PY) bench/bench_softmax_loss.py $(BENCH_ARGS)

bench-sigmoid: venv  ## run the benchmark of the sigmoid losses and of images (BENCH_ARGS="...")
	$(PY) bench/bench_sigmoid_loss.py $(BENCH_ARGS)

# Not in .venv: a machine with a GPU may be offline, and has its own torch.
GPU_PYTHON ?= python3
OUT ?= bench-output
gpu-check:  ## on a machine with a GPU: build, test and time (OUT=folder GPU_PYTHON=python3 GPU_ARGS=--dry-run)
	$(GPU_PYTHON) bench/gpu_check.py $(OUT) $(GPU_ARGS)

mutants: venv  ## break each formula in turn and see that the tests notice
	$(PY) tests/mutate_objectives.py

lint: $(VENV)/.installed  ## check style and types
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC) $(EMULATION)
	$(PY) -m mypy

format: $(VENV)/.installed  ## rewrite the sources in the project's style
	$(PY) -m ruff check --fix
	$(PY) -m ruff format
	$(VENV)/bin/clang-format -i $(CSRC) $(EMULATION)

# The pictures are drawn by matplotlib, which .installed has; the extension is not needed.
$(VENV)/.docs: $(VENV)/.installed
	IMBALANCE_KERNELS_BUILD=0 $(PIP) install -c constraints.txt --no-build-isolation -e '.[docs]'
	touch $@

docs: $(VENV)/.docs  ## draw the pictures of the losses and build the documentation into site/, warnings as errors
	$(PY) docs/make_pictures.py
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

wheel: venv  ## build both wheels into dist/: pure Python, and with the extension for this Python
	rm -rf build/lib*  # setuptools would pack files deleted since
	IMBALANCE_KERNELS_BUILD=0 $(PIP) wheel --no-deps --no-build-isolation -w dist .
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PIP) wheel --no-deps --no-build-isolation -w dist .

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build dist site *.egg-info imbalance_kernels/_C*.so
