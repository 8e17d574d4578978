#!/usr/bin/env bash
# Runs maect_jax on all hosts of a Cloud TPU slice:
#   launch/tpu_pod.sh [--dry-run] run NAME ZONE TYPE --workdir=FOLDER [flags of maect_jax.main]
#   launch/tpu_pod.sh [--dry-run] logs NAME ZONE
#   launch/tpu_pod.sh [--dry-run] delete NAME ZONE
# `run` makes the slice unless it is there (TYPE: v5litepod-16, v4-32, ...), installs what is
# committed here, starts `python -m maect_jax.main` on every host, in place of an earlier one, and
# follows the logs, which end with its status. The run goes on when this is interrupted; `logs`
# follows it again. FOLDER, the images and the run to start from must be absolute paths on storage
# that is mounted on all hosts (NFS, gcsfuse). RUNTIME names another image of the slice. --dry-run,
# at any place, prints the commands and runs none. There is no TPU7x: docs/guide_tpu.md says why.
set -euo pipefail

usage() { sed -n '2,5p' "$0" >&2; exit 2; }
dry=false arguments=()
for argument; do
  case $argument in --dry-run) dry=true ;; *) arguments+=("$argument") ;; esac
done
set -- "${arguments[@]}"
[[ $# -ge 3 && $2 != -* && $3 != -* ]] || usage
action=$1 name=$2 zone=$3
shift 3

run() { printf '$ %s\n' "${*@Q}" && { $dry || "$@"; }; }
tpu() { run gcloud compute tpus tpu-vm "$1" "$name" --zone="$zone" "${@:2}"; }
on_all() { tpu ssh --worker=all --command="$1"; }
logs() { on_all "cd maect_jax && tail -n +1 --pid=\$(cat run.pid) -f run.log"; }

case $action in
run)
  [[ $# -ge 2 && " $*" == *" --workdir=/"* ]] || usage
  type=$1
  shift
  case $type in v6e-*) image=v2-alpha-tpuv6e ;; v5p-*) image=v2-alpha-tpuv5 ;;
  v5litepod-*) image=v2-alpha-tpuv5-lite ;; v4-*) image=tpu-ubuntu2204-base ;; *) usage ;; esac
  if ! tpu describe --format='value(state)' || $dry; then
    tpu create --accelerator-type="$type" --version="${RUNTIME:-$image}"
  fi
  archive=maect_jax.tar.gz
  run git -C "$(dirname "$0")/.." archive --prefix=maect_jax/ --output="/tmp/$archive" HEAD
  run gcloud compute tpus tpu-vm scp "/tmp/$archive" "$name:" --zone="$zone" --worker=all
  # The images' own Python is 3.10.
  on_all "pkill -f '[m]aect_jax.main'; rm -rf maect_jax && tar -xzf $archive &&
    python3 -m pip install -q --user uv && cd maect_jax && uv=~/.local/bin/uv &&
    \$uv venv -q --python 3.12 .venv && \$uv pip install -q -e '.[tpu]'"
  # The address of one host makes one program of them; their number JAX finds out by itself.
  endpoints=http://metadata/computeMetadata/v1/instance/attributes/worker-network-endpoints
  on_all "cd maect_jax &&
    first=\$(curl -s -H 'Metadata-Flavor: Google' $endpoints | cut -d, -f1 | cut -d: -f3) &&
    export JAX_COORDINATOR_ADDRESS=\$first:8476 && { nohup sh -c '\"\$@\"; echo status \$?' main \
    .venv/bin/python -m maect_jax.main ${*@Q} >run.log 2>&1 & echo \$! >run.pid; }"
  logs
  ;;
logs) logs ;;
delete) tpu delete --quiet ;;
*) usage ;;
esac
