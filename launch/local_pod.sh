#!/usr/bin/env bash
# Runs `python -m maect_jax.main` as N processes on this machine that work as one program, as the
# hosts of a pod do:  launch/local_pod.sh N [--config=... and the other flags of main]
# Where one of them fails the others are ended, and its status is that of the script; 75 says that
# they were preempted; run the same command to resume.
set -euo pipefail

processes=${1:-}
if [[ ! $processes =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local_pod.sh N [flags of maect_jax.main]" >&2
  exit 2
fi
shift
free_port='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
export JAX_COORDINATOR_ADDRESS=${JAX_COORDINATOR_ADDRESS:-127.0.0.1:$(python -c "$free_port")}
export JAX_NUM_PROCESSES=$processes
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the processes share the cores

end() { # SIGNAL STATUS: passes the signal on, and waits for half a minute before it kills
  trap '' INT TERM
  for signal in "$1" KILL; do
    mapfile -t left < <(jobs -pr)
    [[ ${#left[@]} -eq 0 ]] || kill "-$signal" "${left[@]}" 2>/dev/null || true
    for ((tenths = 0; tenths < 300; tenths++)); do
      if [[ -z $(jobs -pr) ]]; then
        wait "$first" || [[ $? -ne 75 ]] || exit 75
        exit "$2"
      fi
      sleep 0.1
    done
  done
}
first=
trap 'end INT 130' INT
trap 'end TERM 143' TERM
set -m # a process that is started in the background ignores SIGINT otherwise
for ((id = 0; id < processes; id++)); do
  JAX_PROCESS_ID=$id python -m maect_jax.main "$@" &
  first=${first:-$!}
done
for ((id = 0; id < processes; id++)); do
  wait -n || end TERM $?
done
