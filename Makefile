# Two commands do everything: `make reproduce` and `make test` (with `make test-slow`). All install what they need into .venv first.
PYTHON  ?= python3.11
PROFILE ?= digits
BIN     := .venv/bin

.PHONY: test test-slow reproduce paper benchmark lint lock clean
.DELETE_ON_ERROR:

.venv/.ready: pyproject.toml requirements.lock.txt
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "wdat: $(PYTHON) with venv is needed (Debian: apt-get install python3-venv), or name another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -r requirements.lock.txt
	$(BIN)/pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

test: .venv/.ready
	$(BIN)/python -m pytest -n 2 -m "not slow" $(TESTS)

# What is slow by nature: processes killed, the notebooks of the smallest profile, wide networks.
test-slow: .venv/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow $(TESTS)

reproduce: .venv/.ready
	$(BIN)/wdat reproduce --profile $(PROFILE) $(ARGS)

paper: .venv/.ready
	$(BIN)/wdat paper $(ARGS)

benchmark: .venv/.ready
	$(BIN)/python -m benchmarks.benchmark $(ARGS)

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Needs uv; the lock holds for CPython 3.11 and 3.12 on Linux.
lock:
	uv pip compile --universal --python-version 3.11 --no-annotate --no-emit-index-url --no-emit-find-links --extra dev --extra notebooks --extra robustbench --custom-compile-command "make lock" pyproject.toml -o requirements.lock.txt

clean:
	rm -rf .venv .wdat
