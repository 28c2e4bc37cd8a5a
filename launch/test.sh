#!/usr/bin/env bash
# Runs the tests, making the environment first. See usage below.
set -euo pipefail
take_newer=""
if [ "${1:-}" = --newer ]; then
  take_newer=yes
  shift
fi
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
usage: launch/test.sh [--newer] [--all | --isa AVX2|SSE4_2 | --targets] [OPTION...]

Runs the tests on the CPU (8 virtual devices), without the slow ones. Needs Python 3.11 or newer;
makes an environment in .venv, which the next call uses again. OPTION is passed on to pytest, for
example:
  tests/methods/test_grpo.py -n 0         one file, in one process
  tests/parity --golden DIR               another set of golden arrays
  -m slow                                 the slow ones alone

--newer, before all others, takes another environment, .venv-newer, with Python 3.12 or later and the
JAX and NumPy of constraints-newer.txt.

--all, before the others, runs the slow ones as well: whole runs of every recipe, runs of several
processes, runs that are killed anywhere.

--isa, before the others, runs one case of every test that compares floats, compiled for an x86
processor that has AVX2 or SSE 4.2 at the most: other instructions add in another order and round
elsewhere.

--targets, before the others, runs what is compiled for GPUs and TPUs that are not here. It brings
their compilers (2 GB, Linux on x86) into a folder beside the environment's packages, because JAX
would look for such devices at every start.

Environment: PYTHON=... makes the environment with that interpreter, VAPI_VENV=... in that place.
TEXT
}

for argument in "$@"; do
  case "$argument" in
    -h | --help) usage; exit 0 ;;
  esac
done

case "${1:-}" in
  --all) shift ;;
  --isa | --targets) ;;
  *) set -- -m "not slow" "$@" ;;
esac
if [ "${1:-}" = --isa ]; then
  case "${2:-}" in  # for XLA, for PyTorch, for the linear algebra of NumPy
    AVX2) cases=first; export ATEN_CPU_CAPABILITY=avx2 OPENBLAS_CORETYPE=Haswell ;;
    SSE4_2) cases=last; export ATEN_CPU_CAPABILITY=default OPENBLAS_CORETYPE=Nehalem ;;
    *) die "--isa takes AVX2 or SSE4_2, not '${2:-}'" ;;
  esac
  export XLA_FLAGS="--xla_cpu_max_isa=$2 ${XLA_FLAGS:-}"
  shift 2
  set -- -m "floats and not slow" --cases "$cases" "$@"
fi

prepare test,text
cd "$root"
if [ "${1:-}" = --targets ]; then
  [ -z "$newer" ] || die "--newer has no compilers for other devices: leave --targets out"
  shift
  prepare_compilers
  export PYTHONPATH="$compilers${PYTHONPATH:+:$PYTHONPATH}" VAPI_COMPILERS=1
  export ALLOW_MULTIPLE_LIBTPU_LOAD=1  # both workers compile
  [ $# -gt 0 ] || set -- $(grep -rl --include='test_*.py' 'mark\.targets' tests)
  set -- -m targets "$@"
fi
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
