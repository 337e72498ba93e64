#!/usr/bin/env bash
# A run on a TPU slice (or several) in GKE, as a JobSet, one process for each host:
#
#   NAME=sft IMAGE=REGISTRY/openo3 ACCELERATOR=tpu-v5p-slice TOPOLOGY=2x2x4 HOSTS=4 CLAIM=shared \
#     scripts/jobset.sh sft sft_7b --model /shared/MODEL --data /shared/ROOT --out /shared/RUN
#
# What follows the script's name are the words of openo3 on one machine. docs/launch_gke.md
set -euo pipefail

: "${NAME:?of the JobSet}" "${IMAGE:?with openo3-jax[tpu] installed}" "${ACCELERATOR:?such as tpu-v5p-slice}"
: "${TOPOLOGY:?such as 2x2x4}" "${HOSTS:?of one slice}" "${CLAIM:?a PersistentVolumeClaim that all hosts can write}"

words=""
for word in openo3 "$@" --resume --distributed; do
  word=${word//\\/\\\\}
  words+="                    - \"${word//\"/\\\"}\""$'\n'
done

kubectl apply -f - <<MANIFEST
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: ${MAX_RESTARTS:-10}
    rules: # a mistake (exit code 2) stays one: no restart
      - action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: ${SLICES:-1}
      template:
        spec:
          parallelism: $HOSTS
          completions: $HOSTS
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: openo3, operator: In, values: [2]}
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 300
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
                cloud.google.com/gke-tpu-topology: $TOPOLOGY
              containers:
                - name: openo3
                  image: $IMAGE
                  command:
$words                  resources: {limits: {google.com/tpu: ${CHIPS:-4}}}
                  volumeMounts: [{name: shared, mountPath: /shared}]
              volumes: [{name: shared, persistentVolumeClaim: {claimName: $CLAIM}}]
MANIFEST
