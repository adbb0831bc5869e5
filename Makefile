# make demo   the whole method on the embedded default, five minutes on two idle cores
# make test   the test suite; make test-faults kills processes and nodes in every stage and runs the benchmarks
# Both build .venv from the pinned lock first (CPU; about 4 GB, a minute or two).

PYTHON ?= python3
# Further pip options, for instance where to find the CPU build of torch.
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
OFFLINE := HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
TORCH := $(shell grep '^torch==' requirements/cpu.txt)

# Without byte code every worker process would compile torch, Ray and vLLM: minutes instead of seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-faults test-fast lint format lock clean help
help:
	@sed -n '1,4s/^# //p' Makefile

.venv: $(VENV)/.installed

$(VENV)/.installed: requirements/cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	@command -v c++ >/dev/null || \
		{ echo "a C++ compiler is needed (DeepSpeed builds its communication op with it): install g++"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q $(PIP_ARGS) --no-deps "$(TORCH)" || { \
		echo; \
		echo "pip cannot see $(TORCH), the CPU build of PyTorch. Either"; \
		echo "  make $(MAKECMDGOALS) PIP_ARGS='--extra-index-url URL'   with the address of PyTorch's CPU wheel index (PyTorch's"; \
		echo "                                         'Get started' page, Pip + CPU), or"; \
		echo "  make $(MAKECMDGOALS) PIP_ARGS='--find-links FOLDER'     with a folder that holds the wheel."; \
		exit 1; }
	@# The lock is complete: --no-deps keeps out the CUDA builds of torchaudio and torchcodec.
	$(BIN)/pip install -q $(PIP_ARGS) --no-deps -r requirements/cpu.txt
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	@# torchvision is a CUDA build too; its Python part works once its operators are declared.
	@echo 'import mmedpo_ray.compat.torchvision_on_cpu as on_cpu; on_cpu.install()' > \
		"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/mmedpo_torchvision.pth"
	@touch $@

demo: .venv
	$(OFFLINE) $(BIN)/mmedpo run --config configs/phantom.yaml

# Test files run in parallel: one per core, or two if they start engines, which need memory and wait a lot.
# These keep their order: the whole pipeline comes first, because its files take longest.
EVERY_CORE := -n logical --maxprocesses 8 --dist loadfile
TWO := -n 2 --dist loadfile --no-loadscope-reorder

# Every part runs, even if one before it fails.
test: .venv
	@result=0; for part in "tests/unit tests/invariant $(EVERY_CORE)" "tests/e2e tests/ray $(TWO)"; do \
		$(OFFLINE) $(BIN)/python -m pytest -m "not slow" $$part || result=$$?; \
	done; exit $$result

test-faults: .venv
	$(OFFLINE) $(BIN)/python -m pytest -m slow $(TWO)

test-fast: .venv
	$(OFFLINE) $(BIN)/python -m pytest tests/unit $(EVERY_CORE)

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: .venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Resolves requirements/cpu.in again. Two packages are left out: their wheels are CUDA builds that break a CPU torch.
lock: .venv
	$(BIN)/uv pip compile requirements/cpu.in $(UV_ARGS) --index-strategy unsafe-best-match --python-version 3.11 \
		--no-annotate --no-header --no-emit-find-links --no-emit-index-url \
		--no-emit-package torchaudio --no-emit-package torchcodec -q \
		| grep -v -e '^-e' -e '^#' > requirements/cpu.txt.tmp
	mv requirements/cpu.txt.tmp requirements/cpu.txt

clean:
	rm -rf $(VENV) runs build *.egg-info
