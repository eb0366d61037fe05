#!/usr/bin/env bash
# One node's vLLM servers, from port FIRST_PORT (8000) on, one for every GPUS_PER_SERVER of its GPUs.
#
#   GPUS_PER_NODE=8 GPUS_PER_SERVER=2 serve.sh CONFIG [key=value ...]
#
# A server that ends is started again; the trainer gives it the weights and goes on using it. They
# listen on all of the node's addresses and ask for no password: the network must be closed.
set -euo pipefail
trap '' USR1 # means the trainers, not the servers
trap 'trap "" TERM; kill 0; wait' TERM EXIT

serve() {
  local first_gpu=$(($1 * GPUS_PER_SERVER)) port=$((${FIRST_PORT:-8000} + $1)) gpus pid=
  shift
  gpus=$(seq -s , "$first_gpu" $((first_gpu + GPUS_PER_SERVER - 1)))
  trap 'kill -TERM -- "-$pid" || true; exit' TERM
  while true; do
    CUDA_VISIBLE_DEVICES=$gpus setsid flowrl serve "$@" --host 0.0.0.0 --port "$port" &
    pid=$!
    wait "$pid" || true
    kill -KILL -- "-$pid" 2> /dev/null || true # vLLM's engine outlives a server that was killed
    echo "$(hostname):$port ended and is started again" >&2
    sleep "${RESTART_AFTER_S:-5}" &
    wait $!
  done
}

for ((server = 0; server < GPUS_PER_NODE / GPUS_PER_SERVER; server++)); do
  serve "$server" "$@" &
done
wait
