#!/usr/bin/env bash
# One node's share of `flowrl train` over several nodes: checks the node, then starts torchrun.
#
#   NUM_NODES=2 RANKS_PER_NODE=8 RDZV_ENDPOINT=node1:29500 RDZV_ID=1 node.sh CONFIG [key=value ...]
#
# Run it once on every node; flowrl.sbatch does, under Slurm. RDZV_ENDPOINT is a free port of one of
# the nodes, RDZV_ID any word that the nodes of this job share. NODE_ADDRESS, if set, is the name or
# address by which the others reach this node. SIGUSR1 ends the run after the step, with a checkpoint.
set -euo pipefail

if command -v nvidia-smi > /dev/null; then
  num_gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader | wc -l)
  num_broken=$(nvidia-smi --query-gpu=ecc.errors.uncorrected.volatile.total \
    --format=csv,noheader | grep -c '^[1-9]' || true)
  if ((num_gpus < RANKS_PER_NODE || num_broken > 0)); then
    echo "$(hostname): $num_gpus GPUs for $RANKS_PER_NODE ranks, $num_broken of them with" \
      "memory errors; exclude this node" >&2
    exit 1
  fi
fi

# The agent would answer SIGUSR1 by dying, and SIGTERM by killing its ranks 30 s later. So it is kept
# from the first, and the ranks get the second themselves: they finish the step, save and end.
(
  trap '' USR1
  exec torchrun \
    --nnodes "$NUM_NODES" \
    --nproc-per-node "$RANKS_PER_NODE" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$RDZV_ENDPOINT" \
    --rdzv-id "$RDZV_ID" \
    ${NODE_ADDRESS:+--local-addr "$NODE_ADDRESS"} \
    -m flowrl train "$@"
) &
agent=$!
trap 'pkill -TERM -P "$agent" || true' USR1

while kill -0 "$agent" 2> /dev/null; do
  wait "$agent" || true # a signal ends the wait, not the agent
done
wait "$agent" # its exit code, which bash remembers
