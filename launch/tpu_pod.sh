#!/usr/bin/env bash
# Runs a command on a Cloud TPU pod slice, one process on each of its machines. See usage below.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/tpu_pod.sh NAME [COMMAND] [OPTION...]

Runs vapi_jax.COMMAND (main, where none is named) at the same time on all machines of the TPU virtual
machine NAME (gcloud's word for a slice). vapi_jax with JAX for TPU must be installed on all of them, in
the same directory, and what is read and written be on a file system that they share (Filestore, or a
mounted bucket). OPTIONs are passed on:
  launch/tpu_pod.sh my-slice --config=configs/c2i_xxl.py --workdir=/mnt/runs/xxl
  launch/tpu_pod.sh my-slice sample --ckpt=/mnt/runs/xxl --protocol=adm50k --out=/mnt/samples/xxl

The machines find each other by Cloud TPU's own description of the slice. A process that fails or
dies ends all of them; run the same line again to go on from the last checkpoint.

Environment:
  ZONE=...     the slice's zone (default: gcloud's own setting)
  PROJECT=...  its project (default: gcloud's own setting)
  REMOTE=...   the repository on the machines (default: vapi_jax, in the home directory)
  PYTHON=...   the interpreter there (default: .venv/bin/python of that repository)
TEXT
}

for argument in "$@"; do
  case "$argument" in
    -h | --help) usage; exit 0 ;;
  esac
done
if [ $# -lt 2 ] || [[ "$1" == -* ]]; then
  usage >&2
  exit 2
fi
name="$1"
shift
if ! command -v gcloud >/dev/null 2>&1; then
  printf 'error: gcloud is not on PATH: install the Google Cloud CLI\n' >&2
  exit 2
fi

case "${1:-}" in
  -* | "") set -- main "$@" ;;
esac

# The command passes through a shell on the machines, so every word of it is quoted for one.
printf -v command '%q ' "${PYTHON:-.venv/bin/python}" -m vapi_jax "$@"
printf -v directory '%q' "${REMOTE:-vapi_jax}"
exec gcloud compute tpus tpu-vm ssh "$name" --worker=all \
  ${ZONE:+"--zone=$ZONE"} ${PROJECT:+"--project=$PROJECT"} \
  --command="cd $directory && exec $command"
