#!/usr/bin/env bash
# Runs `python -m maect_jax.main` as N processes on this machine that work as one program, as the
# hosts of a pod do:  launch/local_pod.sh N [--config=... and the other flags of main]
set -euo pipefail

processes=${1:?usage: launch/local_pod.sh N [flags of maect_jax.main]}
shift
export JAX_COORDINATOR_ADDRESS=${JAX_COORDINATOR_ADDRESS:-127.0.0.1:9876}
export JAX_NUM_PROCESSES=$processes

trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
for ((id = 1; id < processes; id++)); do
  JAX_PROCESS_ID=$id python -m maect_jax.main "$@" &
done
JAX_PROCESS_ID=0 python -m maect_jax.main "$@"
wait
