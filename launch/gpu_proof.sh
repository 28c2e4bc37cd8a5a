#!/usr/bin/env bash
# What one GPU makes of the code, in under nine minutes. See usage below.
set -uo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

usage() {
  cat <<'TEXT'
usage: launch/gpu_proof.sh [--dry-run] [OUT]

On one H100 or the like, without a network: correctness first, then the XXL step at 128 x 8 with its
phases and top kernels, its variant h100x1 beside other settings, the fastest named, the XL step, the plain
step at a batch that fits, and sampling at guidance 1 and 1.75. Writes OUT/proof.json and OUT/proof.md,
the latter ready for docs/performance.md (default OUT: runs/gpu_proof/<time>), and the log of every part.

--dry-run runs all parts except the XL step in tiny sizes on the CPU.

Environment: PYTHON=... is an interpreter that has the package's dependencies and JAX for the GPU; by
default that of .venv. SECONDS_LEFT=... is the time for all parts (540): one that cannot begin any more is
named in proof.md.
TEXT
}

dry=""
case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  --dry-run) dry=yes; shift ;;
esac
out="${1:-$root/runs/gpu_proof/$(date +%Y%m%d-%H%M%S)}"
mkdir -p "$out" && out="$(cd "$out" && pwd -P)" || exit 1
rm -f "$out"/*.json "$out"/missing.txt
python="${PYTHON:-${VAPI_VENV:-$root/.venv}/bin/python}"
patience=1 total=540
[ -z "$dry" ] || patience=10 total=5400 # a busy CPU is no fault
end=$((SECONDS + ${SECONDS_LEFT:-$total}))
cd "$root" || exit 1
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$out/compilation_cache}"
failed=0

# part NAME LIMIT MODULE ARGUMENT...: one process, its figures in OUT/NAME.json, its words in OUT/NAME.log.
part() {
  local name="$1" limit=$(($2 * patience)) left=$((end - SECONDS)) started=$SECONDS status=0
  shift 2
  if [ "$left" -lt 20 ]; then
    printf '%s (no time left)\n' "$name" >>"$out/missing.txt"
    return
  fi
  local flag=json
  [ "$1" != vapi_jax.bench.proof ] || flag=checks
  timeout -k 5 "$((left < limit ? left : limit))" "$python" -m "$@" "--$flag=$out/$name.json" \
    >"$out/$name.log" 2>&1 || status=$?
  printf '%-12s %4d s, status %d\n' "$name" "$((SECONDS - started))" "$status"
  if [ "$status" -ne 0 ]; then
    failed=1
    tail -n 3 "$out/$name.log"
    [ -f "$out/$name.json" ] || printf '%s (status %d)\n' "$name" "$status" >>"$out/missing.txt"
  fi
}

alone=(--config.mesh.data=1 --config.mesh.fsdp=1)
small=("${alone[@]}" --config.batch_size=2 --config.microbatch_size=0)
tiny=(--config=configs/c2i_xxl.py:tiny "${small[@]}")
xxl=(--config=configs/c2i_xxl.py "${alone[@]}")
xl=(--config=configs/c2i_xl.py "${alone[@]}")
oracle=("${xxl[@]}" --config.batch_size=16 --config.microbatch_size=4)
fast=(--config=configs/c2i_xxl.py:h100x1 "${alone[@]}")
settings=(--vary=microbatch_size=16,64 --vary=policy.remat=full)
steps=5 batch=64
if [ -n "$dry" ]; then
  # Nobody looks at these figures, and what one part has compiled is another's as well.
  export JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=1
  export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1
  small+=(--config.cpu_devices=1)
  tiny+=(--config.cpu_devices=1)
  xxl=(--config=configs/bench_cpu.py:tiny "${small[@]}") # bfloat16 is slow on a CPU
  oracle=("${xxl[@]}") fast=("${xxl[@]}")
  settings=(--vary=decode_chunk=2)
  steps=1 batch=2
fi

part checks 150 vapi_jax.bench.proof "${tiny[@]}"
part xxl 180 vapi_jax.bench "${xxl[@]}" "--steps=$steps" --kernels=15
part sample_1 120 vapi_jax.bench --mode=sample "${xxl[@]}" "--batch=$batch" --cfg=1 --steps=1
part settings 150 vapi_jax.bench "${fast[@]}" "--steps=$((steps > 3 ? 3 : steps))" "${settings[@]}"
part sample_cfg 120 vapi_jax.bench --mode=sample "${xxl[@]}" "--batch=$batch" --cfg=1.75 --steps=1
part plain 120 vapi_jax.bench "${oracle[@]}" --steps=1 --plain
[ -n "$dry" ] || part xl 90 vapi_jax.bench "${xl[@]}" "--steps=$steps"
"$python" -m vapi_jax.bench.proof "--table=$out" || failed=1
exit "$failed"
