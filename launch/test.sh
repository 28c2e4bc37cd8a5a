#!/usr/bin/env bash
# Runs the tests, making the environment first. See usage below.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
usage: launch/test.sh [OPTION...]

Runs the whole test suite on the CPU (8 virtual devices). Needs Python 3.11 or newer; makes an
environment in .venv, which the next call uses again. OPTION is passed on to pytest, for example:
  -m "not slow"                           leave out what takes long
  tests/methods/test_grpo.py -n 0                 one file, in one process
  tests/parity --golden DIR               another set of golden arrays

Environment: PYTHON=... makes the environment with that interpreter, VAPI_VENV=... in that place.
TEXT
}

for argument in "$@"; do
  case "$argument" in
    -h | --help) usage; exit 0 ;;
  esac
done

prepare test
cd "$root"
exec "$python" -m pytest -n 2 --dist worksteal "$@"
