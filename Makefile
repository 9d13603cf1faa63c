# make run   set-up, then verify the kernels and train WGAN-GP on stock PyTorch and on gankern, side by side
# make test  set-up, then all linters and tests
# make wheels  what a release consists of, to dist/
# make fuzz cases that are drawn against formulas, for SECONDS (two hours)
# make docs  the docs as a site, to site/
# make gpu   on a CUDA machine: build, GPU tests, GPU benchmarks, records to $OUT
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
RUN ?= runs/wgan_gp-$(shell date +%Y%m%d-%H%M%S)
# Narrower and faster than the paper's: strokes of digits after two minutes on two cores.
RECIPE ?= --width 16 --lr 1e-3 --n-critic 2 --ema 0.99 --steps 220 --checkpoint-every 55 --evaluate 2

.PHONY: run test fuzz build docs lint gpu bench wheels clean

run: build
	$(BIN)/gankern verify --quick
	THP_MEM_ALLOC_ENABLE=1 $(BIN)/gankern train wgan_gp --data mnist5k --compare $(RECIPE) --out $(RUN)

# A process a core; threads that wait must not spin on the cores of the others.
test: lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto

# Cases that are drawn, of each family in turn, for SECONDS: a line for each wrong one, which runs it again.
SECONDS ?= 7200
fuzz: build
	SECONDS=$(SECONDS) FIRST=$${FIRST:-1000} $(BIN)/python tests/fuzz/run.py

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/*.cpp')
	$(BIN)/lint-imports
	$(BIN)/mypy gankern

# For a release: the source archive, and a wheel with the C++ kernels and one without; docs/install.md says the rest.
wheels: build
	rm -rf dist build/lib* build/bdist*
	PYTHONPATH=scripts $(BIN)/python -c "import build_backend; build_backend.build_sdist('dist')"
	for native in 0 1; do GANKERN_BUILD_NATIVE=$$native $(BIN)/pip wheel --no-build-isolation --no-deps -w dist dist/*.tar.gz || exit 1; done

docs: build
	$(BIN)/mkdocs build --strict

bench: build
	$(BIN)/gankern bench --quick

gpu:
	$(PYTHON) scripts/gpu.py

# Set-up happens once; the native library is brought up to date every time, in a moment where nothing changed.
build: .venv/ready
	@mkdir -p build
	@$(BIN)/python setup.py --quiet build_ext --inplace > build/log.txt 2>&1 || (cat build/log.txt; exit 1)

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel cmake ninja pybind11 torch numpy
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[test]'
	touch $@

clean:
	rm -rf .venv build *.egg-info gankern/*.so
