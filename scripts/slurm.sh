#!/usr/bin/env bash
# A run on nodes of 8 GPUs under Slurm, one process for each node:
#
#   sbatch --nodes 4 scripts/slurm.sh sft sft_7b --batch-size 32 --steps 974 --model MODEL --data ROOT --out RUN
#
# What follows the script's name are the words of openo3 on one machine. docs/launch_slurm.md
#SBATCH --job-name=openo3
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --output=openo3-%j.log
#SBATCH --open-mode=append
set -uo pipefail

# More often than this a job that fails is not put back into the queue.
MAX_RESTARTS=${MAX_RESTARTS:-10}

srun openo3 "$@" --resume --distributed
code=$?

# 75: stopped by a signal with the state saved. 1 or a signal: a node may be gone. 2: a mistake, which stays one.
if [ "$code" = 75 ] || { { [ "$code" = 1 ] || [ "$code" -gt 128 ]; } &&
  [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_RESTARTS" ]; }; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
