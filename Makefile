# `make` lists the targets.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV ?= .venv
export VENV_ORACLES ?= $(VENV)-oracles
# make splits words, and so do the first lines of the scripts that pip installs
ifneq ($(words $(CURDIR) $(VENV)),2)
$(error "$(CURDIR)", VENV=$(VENV): make cannot work in a path with a space; move the checkout to one without)
endif
PY := $(abspath $(VENV))/bin/python
export OMP_NUM_THREADS ?= 1
PYTEST_ARGS ?=
PARTS ?=
AGAINST ?=
ONLY ?=

.PHONY: help setup setup-oracles demo test test-ci test-all nightly test-cluster test-gpu check parity parity-all bench bench-parallel bench-gpu bench-checkpoint bench-data flags format clean distclean timeline

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: ## .venv with everything the demo and the tests need; instant when nothing changed
	@VENV="$(VENV)" tools/setup.sh

setup-oracles: ## .venv-oracles: also what nightly tests compare with (deepspeed, lm-eval, ray, torchao, trl), and chromium
	@tools/setup.sh oracles

demo: setup ## real text, trained on 4 CPU ranks, continued at another layout, sampled, plotted
	@PYTHON="$(PY)" examples/demo/run.sh

test: setup ## all tests of a machine without an accelerator but the slow ones
	$(PY) -m pytest -m "not slow and not ci and not gpu and not cluster and not oracles" $(PYTEST_ARGS)

test-ci: setup ## what CI runs beside `make test`: more layouts, more faults, more configurations
	$(PY) -m pytest -m "ci and not slow and not gpu and not cluster and not oracles" $(PYTEST_ARGS)

nightly: setup ## all that CI has no time for, in parts, within 3 hours; PARTS="slow parity" for some of them
	$(PY) -m tests.nightly $(PARTS)

test-all: test-ci test nightly ## every test, the fault suite and the parity of all layouts

test-cluster: setup ## several hosts as network namespaces, trained across and cut off; needs root
	$(PY) -m pytest -m cluster tests/cluster $(PYTEST_ARGS)

test-gpu: setup ## what needs GPUs: one for the kernels, two to eight for the layouts over NCCL
	$(PY) -m pytest -m gpu tests $(PYTEST_ARGS)

check: setup ## lint, format, types, shell scripts, import directions, documents
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy megatron_lite tools
	@PATH="$(dir $(PY)):$$PATH"; if command -v shellcheck >/dev/null; then \
	    shellcheck -x .ci/* tools/*.sh examples/*.sh examples/*/*.sh; \
	else echo "shellcheck is not installed: shell scripts not linted"; fi
	$(PY) -m pytest -q tests/architecture tests/docs tests/examples/test_docs.py

.PHONY: faults faults-long
faults: setup ## 200 kills, bit flips, crafted files, power cuts, lost ranks: one table, under 10 minutes
	$(PY) -m tests.faults

faults-long: setup ## the same with 500 kills and 300 flips
	$(PY) -m tests.faults --kills 500 --flips 300

parity: setup ## the quick layouts against the serial run: a table of differences
	$(PY) -m tests.parity

parity-all: setup ## all layouts, up to 8 processes; writes docs/parity.md
	$(PY) -m tests.parity --all --write docs/parity.md

bench: setup ## tokens/s of a small GPT beside a plain PyTorch loop; with AGAINST=<commit>, beside that commit
	env -u OMP_NUM_THREADS $(PY) benchmarks/$(if $(AGAINST),bench_against.py train "$(AGAINST)",bench_train.py)

bench-parallel: setup ## tp2, pp2, dp2 beside DDP, FSDP2, DTensor, torch's pipelining; or AGAINST=<commit>
	OMP_NUM_THREADS=1 $(PY) benchmarks/$(if $(AGAINST),bench_against.py parallel "$(AGAINST)",bench_parallel.py)

timeline: setup ## real steps of 2 and 4 processes beside their plan: docs/images
	$(PY) benchmarks/trace_overlap.py

bench-gpu: setup ## on one GPU, beside compiled GPT-2 and Hugging Face; ONLY=124m|8b|fp16|documents|all
	$(PY) benchmarks/bench_gpu.py $(if $(ONLY),--only $(ONLY))

bench-checkpoint: setup ## 300M parameters with Adam saved and loaded: stall and GB/s beside torch.save and DCP
	env -u OMP_NUM_THREADS $(PY) -W ignore benchmarks/bench_checkpoint.py

bench-data: setup ## the data side beside its named baselines: indices, start-up, preprocessing
	@for file in benchmarks/bench_data_*.py; do echo "== $$file"; $(PY) -W ignore $$file; done

.PHONY: bench-schedules
bench-schedules: setup ## CPU seconds to lower 1536 micro batches beside torch.distributed.pipelining's lowering
	$(PY) benchmarks/bench_schedules.py

.PHONY: bench-offload
bench-offload: setup ## a step with --optimizer-cpu-offload beside one without, on a GPU where there is one
	$(PY) benchmarks/bench_offload.py

.PHONY: bench-plan
bench-plan: setup ## the planner, calibrated on small runs here, beside measured step times of others
	env -u OMP_NUM_THREADS $(PY) benchmarks/bench_plan.py

flags: setup ## write docs/FLAGS.md anew from the config sections
	$(PY) tools/flags.py

format: setup ## let ruff rewrite what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## remove the demo's files, caches and built extensions
	rm -rf demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find megatron_lite tools tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv and .venv-oracles
	rm -rf $(VENV) $(VENV).setup-* $(VENV_ORACLES) $(VENV_ORACLES).setup-*
