# make demo   set everything up and distil the MNIST teacher without data (less than 5 minutes on 2 CPU cores)
# make test   set everything up and run the tests

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python -m
DEMO ?= runs/demo
SHARE ?= 1  # of the trials of the torture suite
OLDEST ?= python3.10
NEWEST ?= python3.14

# A plain `pip install torch` fetches gigabytes of CUDA packages, so a machine without a GPU takes the CPU build.
# torchvision, which torch-fidelity needs, comes from the same place: one of another build cannot be imported.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_FALLBACK ?= torch==2.13.0

SUITES = toy digits freeflow mismatch synergy ablations mnist_ablations guidance fashion_mnist  # mnist: in a night
DELTAS = (0.125, 0.25, 0.5, 0.75, 0.9, 1.0)  # of docs/claims/errors.md

.PHONY: demo test test-all torture versions lint docs check-site gallery benchmarks clean

demo: $(VENV)/installed
	$(RUN) flowdistill train freeflow/mnist.gin --workdir $(DEMO) $(DEMO_FLAGS)
	@echo "open $(DEMO)/report.md"

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN) pytest -n auto --dist loadfile -m "not slow"

torture: $(VENV)/installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python tests/torture --share $(SHARE)

test-all: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN) pytest -n auto --dist loadfile

versions:  # the oldest and the newest Python and torch, in new virtual environments: gigabytes
	tests/check_versions.sh $(OLDEST) $(NEWEST)

lint: $(VENV)/developer
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

docs: $(VENV)/developer
	$(RUN) mkdocs build --strict

check-site: docs
	$(VENV)/bin/python docs/check_site.py

gallery: $(VENV)/installed
	mkdir -p runs/gallery
	for script in docs/gallery/*.py; do \
		name=$$(basename $$script .py); \
		(cd runs/gallery && $(abspath $(VENV))/bin/python ../../$$script >$$name.txt) || exit 1; \
		cp runs/gallery/$$name.png runs/gallery/$$name.txt docs/gallery/; \
	done

benchmarks: $(VENV)/installed
	$(RUN) flowdistill bench speed --out benchmarks/results/speed
	$(VENV)/bin/python benchmarks/teachers.py digits
	$(VENV)/bin/python benchmarks/teachers.py mnist_sit
	$(VENV)/bin/python benchmarks/teachers.py mnist_edm2
	$(VENV)/bin/python benchmarks/teachers.py fashion_sit
	$(VENV)/bin/python benchmarks/pseudo_velocity.py
	$(VENV)/bin/python benchmarks/search.py digits --jobs 2
	$(VENV)/bin/python benchmarks/search.py mnist --jobs 2
	rm -f $(SUITES:%=benchmarks/results/%/results.json) benchmarks/results/toy_quick/results.json benchmarks/results/errors/results.json
	for suite in $(SUITES); do \
		$(RUN) flowdistill bench $$suite --jobs 2 --out benchmarks/results/$$suite || exit 1; \
	done
	$(RUN) flowdistill bench synergy --gin.bench.budgets="(150_000,)" --gin.bench.deltas="$(DELTAS)" --jobs 2 --out benchmarks/results/errors
	$(RUN) flowdistill bench toy --quick --gin.bench.seeds="(1, 2, 3)" --jobs 2 --out benchmarks/results/toy_quick

clean:
	rm -rf $(VENV) runs site build dist

# Where torch is already importable it is used; the constraint keeps other packages from replacing it.
$(VENV)/torch:
	if $(PYTHON) -c "import torch" 2>/dev/null; then \
		$(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
		$(PYTHON) -m venv $(VENV) && \
		if command -v nvidia-smi >/dev/null; then $(RUN) pip install torch torchvision; \
		else $(RUN) pip install --timeout 5 --retries 0 --index-url $(TORCH_INDEX) torch torchvision \
			|| $(RUN) pip install $(TORCH_FALLBACK); fi; \
	fi
	$(VENV)/bin/python -c "import torch; print('torch==' + torch.__version__.split('+')[0])" > $@.txt
	mv $@.txt $@

$(VENV)/installed: $(VENV)/torch pyproject.toml
	$(RUN) pip install --constraint $(VENV)/torch --editable ".[test]"
	touch $@

$(VENV)/developer: $(VENV)/installed
	$(RUN) pip install --constraint $(VENV)/torch --editable ".[dev]"
	touch $@
