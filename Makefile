# Every target first sets up what it needs, in a virtual environment in this folder. `make` lists the targets.
#
#   make figures PYTHON=python3.12    use another interpreter (3.11 to 3.13)
#   make test ARGS="-k procedures"    pass arguments on to the command that a target runs

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=

PY := $(VENV)/bin/python
CACHES := build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .coverage .hypothesis .artifacts
CACHES += $(wildcard notebooks/.ipynb_checkpoints)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help figures test kernels quantized browser colab tasks lab notebooks lint clean distclean

help:
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

figures: $(VENV)/.installed ## route the held-out text and write every figure, with its data, to figures/
	$(PY) -m bhlib figures $(ARGS)

# Timing tests run first and alone; pytest's status 5 says that ARGS selected none of them.
test: $(VENV)/.installed-dev ## run the whole suite, notebooks included
	$(PY) -m pytest tests -m timing $(ARGS) || [ $$? -eq 5 ]
	$(PY) -m pytest --nbval -m "not timing and not browser" -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations 10 $(ARGS)

# torch for CUDA brings its own Triton. Without a CUDA device the kernels run in Triton's interpreter.
kernels: $(VENV)/.installed-dev ## test the Triton kernels, on the CPU too (installs Triton, 0.2 GB, where there is none)
	$(PY) -c 'import triton' 2>&- || $(PY) -m pip install --disable-pip-version-check --editable '.[kernels]'
	TRITON_INTERPRET=$$($(PY) -c 'import torch; print(int(not torch.cuda.is_available()))') \
	  $(PY) -m pytest tests/test_kernels.py tests/test_kernel_patch.py $(ARGS)

# Into a folder of their own: where torchao is installed, transformers imports it, and it writes to stderr.
quantized: $(VENV)/.installed-dev ## test patching quantized models (installs torchao and bitsandbytes, 0.2 GB)
	$(PY) -m pip install --disable-pip-version-check --no-deps --upgrade --target $(VENV)/quantized 'torchao==0.18.*' 'bitsandbytes==0.50.*'
	PYTHONPATH=$(VENV)/quantized $(PY) -m pytest tests/test_quantized.py $(ARGS)

browser: $(VENV)/.installed-dev $(VENV)/.installed-browser ## run the notebooks in JupyterLab in chromium, and move the explorer's sliders
	$(PY) -m pytest tests/test_browser.py --durations 10 $(ARGS)

colab: $(VENV)/.installed-dev ## run the notebooks with Colab's versions, as in Colab (ARGS=01_bh_theory for one)
	$(PY) tools/colab.py $(ARGS)

tasks: $(VENV)/.installed-dev $(VENV)/.installed-tasks ## test the tasks for lm-evaluation-harness (installs it, 0.4 GB)
	$(PY) -m pytest tests/test_tasks.py $(ARGS)

lab: $(VENV)/.installed-lab ## open JupyterLab on the notebooks
	$(PY) -m jupyterlab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks $(ARGS)

notebooks: $(VENV)/.installed-dev ## make every .ipynb anew from its .py, executed (ARGS=notebooks/01_bh_theory.py for one)
	$(PY) tools/execute_notebooks.py --jobs $(JOBS) $(ARGS)

lint: $(VENV)/.installed-dev ## check style, format and types of the code (to format it: ruff format)
	$(PY) -m ruff check $(ARGS) .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean: ## remove caches and build products; figures/ and the virtual environment stay
	rm -rf $(CACHES)
	find bhlib tests tools notebooks -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environment too
	if [ -f $(VENV)/pyvenv.cfg ]; then rm -rf $(VENV); fi

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "bhlib needs Python 3.11, 3.12 or 3.13, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)"; \
	  echo "Name another interpreter, for example: make $(MAKECMDGOALS) PYTHON=python3.12"; \
	  exit 1; } >&2
	$(PYTHON) -m venv $(VENV)

# The stamps say which list was installed last; they grow stale when the lists change.
$(VENV)/.installed: requirements.txt pyproject.toml | $(VENV)/pyvenv.cfg
	$(PY) -m pip install --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-%: requirements.txt pyproject.toml | $(VENV)/pyvenv.cfg
	$(PY) -m pip install --disable-pip-version-check --editable '.[$*]'
	@touch $@
