# `make demo` runs the main job, `make test` the tests; each sets everything up first, on a bare machine too.
# An active virtual environment (or PYTHON=...) is used as it is; otherwise .venv is made here.

ifdef PYTHON
  PY := $(PYTHON)
else ifdef VIRTUAL_ENV
  PY := $(VIRTUAL_ENV)/bin/python
else
  PY := .venv/bin/python
endif
OUT ?= out

.PHONY: demo test test-gpu sanitize lint build setup info clean

demo: build
	$(PY) -m fastmetro demo --out $(OUT)/demo

test: build lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 tests

# The same test files on a machine with a GPU. Nothing is installed or compiled: the extension is used as built.
test-gpu:
	$(PY) -m fastmetro_kernels.info
	$(PY) -m pytest -p no:cacheprovider -n 8 tests

# compute-sanitizer over small cases of every CUDA op, on a machine with a GPU; the extension is used as built.
sanitize:
	$(PY) tools/sanitize.py --out $(OUT)/sanitize

lint: setup
	$(PY) -m ruff check .
	$(PY) -m mypy

build: setup
	$(PY) setup.py -q build_ext --inplace

info:
	$(PY) -m fastmetro_kernels.info

setup: $(filter .venv/bin/python,$(PY))
	@$(PY) tools/install.py

.venv/bin/python:
	@python3 -m venv .venv || { rm -rf .venv; echo "python3 cannot make a virtual environment: install its venv module (Debian: apt-get install python3-venv)"; exit 1; }

clean:
	rm -rf build out .venv fastmetro_kernels/*.so *.egg-info
