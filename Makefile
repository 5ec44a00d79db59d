# Everything a newcomer needs: make demo · make test. `make help` lists the rest.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
JOBS ?= 2
# Every tensor in an allocation of its own, or an access past the end would land in a neighbour unseen.
SANITIZER := GENREC_TEST_DEVICE=cuda PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1

.PHONY: help install peers serve-env demo test sanitize lint bench kernels-check tune gpu clean
help:
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

# torch comes first and by itself, so that nothing else chooses its build. Without a GPU, name PyTorch's CPU index to save
# gigabytes: make install TORCH="torch==2.13.0 --index-url …"
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
$(VENV)/.torch: | $(BIN)/python
	@$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q $(TORCH)
	@touch $@
# TensorRT-RTX builds engines without a GPU; kernel-lens has TensorRT's headers, and is asked for nothing else.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(wildcard csrc/cpu/*)
	$(BIN)/pip install -q 'setuptools>=77' wheel
	$(BIN)/pip install -q --no-build-isolation -e '.[dev,tensorrt]'
	$(BIN)/pip install -q --no-deps kernel-lens==2.0.1
	@touch $@

# What the benchmarks race against, without building genrec once more.
$(VENV)/.peers: $(VENV)/.installed
	@$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['bench'], sep='\n')" > $@.txt
	$(BIN)/pip install -q -r $@.txt
	@touch $@

install: $(VENV)/.installed  ## .venv with torch, the compiled kernels, genrec and the development tools

demo: install  ## raw MovieLens logs → trained recommender → runs/demo/report.html, about three minutes
	BIN=$(BIN) RUN=$(RUN) sh examples/movielens.sh

peers: $(VENV)/.peers  ## the packages that the benchmarks race against

# The environment that the server's models run in: numpy 1 and no torch.
.venv-serve/.installed: pyproject.toml | $(VENV)/.installed
	$(PYTHON) -m venv .venv-serve
	@$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['serve'], sep='\n')" > .venv-serve/requirements.txt
	.venv-serve/bin/pip install -q -r .venv-serve/requirements.txt
	@touch $@

serve-env: .venv-serve/.installed  ## the environment of Triton Inference Server, 450 MB

test: peers serve-env  ## every test, with coverage, JOBS=2 files at a time, and every benchmark once
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --cov --cov-report=term:skip-covered
	$(BIN)/python -m pytest bench

sanitize: install  ## the CPU kernels under AddressSanitizer, UBSan and ThreadSanitizer; builds them twice more, some five minutes
	$(BIN)/python -m pytest csrc/tests

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: peers  ## everything against the strongest peers there are, some nine minutes → runs/bench.html; BENCH="…" for options
	$(BIN)/python -m pytest bench --benchmark --bench-csv runs/bench.csv $(BENCH)
	$(BIN)/genrec bench report --results runs/bench.csv --out runs/bench.html

kernels-check: install  ## every Triton kernel compiled for six GPU architectures; every operator against float64
	$(BIN)/python -m genrec.kernels.compilation
	$(BIN)/genrec doctor --check true

tune: install  ## search the launch tables on this GPU and rewrite them; OP="moe rq_nearest" names operators
	$(BIN)/python -m genrec.kernels.tuning $(if $(OP),--op $(OP))

gpu: install  ## the kernel tests on a CUDA device, a few under compute-sanitizer, then the benchmarks
	@$(BIN)/python -c "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 'make gpu: no CUDA device found; expected one')"
	@command -v compute-sanitizer >/dev/null || { echo 'make gpu: compute-sanitizer is not on PATH; expected it there, from the CUDA toolkit' >&2; exit 1; }
	GENREC_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/kernels
	$(BIN)/python -m pytest tests/export/test_plugin_cuda.py
	$(SANITIZER) --tool memcheck $(BIN)/python -m pytest tests/kernels/test_every_kernel.py
	$(SANITIZER) --tool racecheck $(BIN)/python -m pytest tests/kernels/test_every_kernel.py
	$(MAKE) bench BENCH="--bench-device cuda --bench-size full"

clean:  ## remove everything that make built
	rm -rf $(VENV) .venv-serve build *.egg-info genrec/*.so .pytest_cache .mypy_cache .ruff_cache .coverage*
