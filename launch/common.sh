# Sourced by demo.sh and test.sh: finds a Python, makes .venv beside pyproject.toml, installs into it.
# Afterwards $root is the repository and $python the interpreter of the environment. With $take_newer, it is
# .venv-newer, with the versions of constraints-newer.txt.

newer="${take_newer:-}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="${VAPI_VENV:-$root/.venv}${newer:+-newer}"
oldest=$([ -n "$newer" ] && echo 3.12 || echo 3.11)
python="$venv/bin/python"
marker="$venv/made-by-vapi_jax"
compilers="$venv/compilers"

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# The first Python >= $oldest that runs and can make environments. A name on PATH may be a shim of a
# version manager that does not run, so every candidate is tried and not just looked up.
find_python() {
  local candidate without_venv=""
  for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3 python; do
    command -v "$candidate" >/dev/null 2>&1 || continue
    "$candidate" -c "import sys; sys.exit(sys.version_info < (${oldest/./, }))" >/dev/null 2>&1 || continue
    if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
    without_venv="$candidate"
  done
  if [ -n "$without_venv" ]; then
    die "$without_venv cannot make environments: install its venv module (Debian and Ubuntu:" \
      "the package python3-venv), or name another interpreter: PYTHON=/path/to/python $0"
  fi
  die "needs Python $oldest or newer (python3.13, python3.12, python3.11 or python3 on PATH)." \
    "Install one, or name it: PYTHON=/path/to/python $0"
}

# What the installed environment depends on. The place belongs to it: an editable install in a
# copied tree would still run the code of the original.
digest() {
  "$python" - "$root" <<'PY'
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
text = repr((sys.version, str(root))).encode()
for name in ("pyproject.toml", "setup.py", "constraints.txt", "constraints-newer.txt"):
    text += (root / name).read_bytes()
print(hashlib.sha256(text).hexdigest())
PY
}

# constraints FILE: the versions to install, written to a file.
constraints() {
  local names
  if [ -z "$newer" ]; then
    cp "$root/constraints.txt" "$1"
    return
  fi
  names="$(sed -n 's/==.*//p' "$root/constraints-newer.txt" | paste -sd'|' -)"
  grep -Ev "^($names)==" "$root/constraints.txt" | cat - "$root/constraints-newer.txt" >"$1"
}

# prepare [EXTRA,...]: the environment with the base dependencies, and those of extras.
# A stamp for each choice makes the second call free, and any choice holds the base. It is written last,
# so that an interrupted installation is taken up again.
prepare() {
  local extra="${1:-}" found wanted stamp started=$SECONDS log="$venv/install.log"
  if [ -e "$venv" ] && [ ! -e "$marker" ]; then
    die "$venv exists and was not made by this script, which leaves it alone." \
      "Move it away, or choose another place: VAPI_VENV=/some/directory $0"
  fi
  if ! "$python" -m pip --version >/dev/null 2>&1; then
    found="$(find_python)"
    printf 'Making %s with %s (%s)\n' "$venv" "$found" "$("$found" --version)"
    rm -rf "$venv" # absent, or a broken one of ours
    mkdir -p "$venv"
    touch "$marker" # first, so that an interrupted attempt is recognised as ours
    "$found" -m venv "$venv" || die "$found could not make an environment in $venv"
  fi
  wanted="$(digest)"
  for stamp in "$venv"/installed-${extra:-*}; do
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
      return
    fi
  done
  stamp="$venv/installed-${extra:-base}"
  constraints "$venv/constraints.txt"
  printf 'Installing vapi_jax%s (a minute or two; log: %s)\n' "${extra:+ with the extra $extra}" "$log"
  if ! "$python" -m pip install --no-input --disable-pip-version-check \
    -c "$venv/constraints.txt" -e "$root${extra:+[$extra]}" >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    die "the installation failed, most often for want of a network or of disk space (1.5 GB)." \
      "The whole log: $log"
  fi
  printf '%s\n' "$wanted" >"$stamp"
  printf 'Installed in %d s\n' "$((SECONDS - started))"
}

# prepare_compilers: after `prepare`, what compiles for GPUs and TPUs, in the folder $compilers.
prepare_compilers() {
  local wanted stamp="$venv/installed-compilers" started=$SECONDS log="$venv/compilers.log"
  wanted="$(digest)"
  if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  printf 'Installing compilers for GPUs and TPUs (log: %s)\n' "$log"
  rm -rf "$compilers"
  if ! "$python" -m pip install --no-input --disable-pip-version-check --no-deps \
    -c "$root/constraints.txt" --target "$compilers" jax-cuda12-plugin jax-cuda12-pjrt \
    nvidia-cublas-cu12 nvidia-cuda-nvrtc-cu12 nvidia-cudnn-cu12 libtpu >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    die "the compilers cannot be installed, most often for want of a network or of disk space (3 GB)." \
      "The whole log: $log"
  fi
  printf '%s\n' "$wanted" >"$stamp"
  printf 'Installed in %d s\n' "$((SECONDS - started))"
}
