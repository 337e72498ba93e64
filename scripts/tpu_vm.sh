#!/usr/bin/env bash
# A run on a TPU slice of Cloud TPU VMs, one process for each of its hosts, through ssh:
#
#   TPU=my-tpu ZONE=us-east5-a \
#     scripts/tpu_vm.sh sft sft_7b --model /shared/MODEL --data /shared/ROOT --out /shared/RUN
#
# What follows the script's name are the words of openo3 on one machine. docs/launch_tpu_vm.md
set -euo pipefail

: "${TPU:?name of the TPU}" "${ZONE:?of the TPU}"

# PREFIX: what a shell on the hosts needs first, such as ". /opt/openo3/bin/activate; ".
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all \
  --command "${PREFIX:-}$(printf '%q ' openo3 "$@" --resume --distributed)"
