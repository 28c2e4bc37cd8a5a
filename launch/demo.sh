#!/usr/bin/env bash
# Runs the demo, making its environment first. See usage below.
set -euo pipefail
take_newer=""
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
usage: launch/demo.sh [WORKDIR] [OPTION...]

Post-trains the shipped demo generator with VA-π on photographs, compares it with its base, and
writes WORKDIR/report.html (default WORKDIR: runs/demo/<time> in the repository). Needs Python 3.11
or newer; makes an environment in .venv, which the next call uses again.

OPTION is passed on to vapi_jax.main; paths in it are relative to the repository. For example:
  --config=configs/c2i_demo.py:full    the controls as well, which takes longer
  --config=configs/c2i_demo.py:tiny    the same path in a minute, to see that it works
  --config=configs/t2i_demo.py         drawn scenes from captions, and GenEval's six scores of them
  --config.vapi.ce_weight=0.2          override one option of the recipe

Environment: PYTHON=... makes the environment with that interpreter, VAPI_VENV=... in that place.
TEXT
}

for argument in "$@"; do
  case "$argument" in
    -h | --help) usage; exit 0 ;;
  esac
done

workdir="$root/runs/demo/$(date +%Y%m%d-%H%M%S)"
case "${1:-}" in
  "") [ $# -eq 0 ] || die "WORKDIR is empty" ;;
  -*) ;;
  /*) workdir="$1"; shift ;;
  *) workdir="$PWD/$1"; shift ;;  # from here on the run happens in the repository
esac

config=(--config=configs/c2i_demo.py)
for argument in "$@"; do
  case "$argument" in
    --config | --config=* | -config | -config=*) config=() ;;
    --workdir | --workdir=* | -workdir | -workdir=*)
      die "give the workdir as the first argument: $0 WORKDIR" ;;
  esac
done

case "$*" in
  *t2i* | *scenes* | *janus*) prepare text ;;  # captions want a tokenizer
  *) prepare ;;
esac
cd "$root"
"$python" -m vapi_jax.main ${config[@]+"${config[@]}"} "--workdir=$workdir" "$@"
if [ -f "$workdir/report.html" ]; then
  printf '\nOpen the report: %s\n' "$workdir/report.html"
fi
