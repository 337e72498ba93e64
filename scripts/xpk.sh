#!/usr/bin/env bash
# A run on TPU slices in GKE through XPK, one process for each host:
#
#   CLUSTER=my-cluster NAME=sft IMAGE=REGISTRY/openo3 TYPE=v5p-32 \
#     scripts/xpk.sh sft sft_7b --model /shared/MODEL --data /shared/ROOT --out /shared/RUN
#
# What follows the script's name are the words of openo3 on one machine. docs/launch_gke.md
set -euo pipefail

: "${CLUSTER:?of XPK}" "${NAME:?of the workload}" "${IMAGE:?with openo3-jax[tpu] installed}" "${TYPE:?such as v5p-32}"

exec xpk workload create --cluster "$CLUSTER" --workload "$NAME" --docker-image "$IMAGE" --tpu-type "$TYPE" \
  --num-slices "${SLICES:-1}" --max-restarts "${MAX_RESTARTS:-10}" \
  --command "$(printf '%q ' openo3 "$@" --resume --distributed)"
