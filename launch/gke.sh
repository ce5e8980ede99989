#!/usr/bin/env bash
# Trains or evaluates on GKE: a JobSet of one pod a host, with TPUs or GPUs.
#
#   launch/gke.sh ACTION --name NAME --image IMAGE [--dry_run]
#     TPU: --tpu tpu-v5-lite-podslice --topology 4x8 [--chips 4] [--slices N]
#     GPU: --gpu nvidia-h100-80gb --hosts N [--chips 8]
#     [--spot] [--max_restarts N] [--namespace NS] [--service_account SA] [--bucket BUCKET]
#     [-- FLAGS OF afi_flax.main]
#
#   build     builds the image for the accelerator and pushes it
#   manifest  prints the JobSet
#   run       runs it; where it runs already, nothing changes; where it has ended, it goes on
#   logs      of the first pod, which says how the run goes
#   status    of the JobSet and its pods
#   delete    the JobSet; its pods save and stop
#
#   --tpu, --gpu    the node label cloud.google.com/gke-tpu-accelerator or gke-accelerator
#   --chips         of each host; without it 4 for TPUs and 8 for GPUs
#   --slices        TPU slices of that topology that share a run
#   --max_restarts  after failures; 10 without. A mistake in what was asked for (exit status 2) is not
#                   tried again; a pod that was stopped with the state saved (75), that waited in vain
#                   for another one to come up (69), or that Kubernetes evicted, always is. Of
#                   several hosts, one that vanishes without a word is a failure
#   --bucket        is mounted as /bucket (Cloud Storage FUSE; needs --service_account)
#   --dry_run       prints what would run
#
# Needs kubectl with the cluster's credentials and JobSet 0.10 or later in the cluster, and for GPUs
# nodes whose NVIDIA driver is one for CUDA 13 (580 or later); docker for build. Give a --workdir in a bucket, gs://BUCKET/FOLDER, which needs --service_account, or on a file
# system that all hosts share.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

action=${1---help}
[[ $action != --help && $action != -h ]] || help
shift
name='' image='' tpu='' gpu='' topology='' hosts='' chips='' namespace='default'
service_account='' bucket='' slices=1 max_restarts=10 spot=false
parse 'name image tpu gpu topology hosts chips namespace service_account bucket slices max_restarts' \
  'spot' "$@"
needs name
bucket=${bucket#gs://}
good_name name "$name"

# A word as a YAML (and JSON) string; $(X) in it stays as it is, which Kubernetes would replace.
string() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  printf '"%s"' "${text//\$(/\$\$(}"
}

check() {
  local word size=1
  needs image
  [[ -n $tpu || -n $gpu ]] || die 'one of --tpu and --gpu is missing; see --help'
  [[ -z $tpu || -z $gpu ]] || die "give one of --tpu $tpu and --gpu $gpu"
  for word in "$image" "$tpu" "$gpu" "$namespace" "$service_account" "$bucket"; do
    [[ $word =~ ^[-a-zA-Z0-9._/:@]*$ ]] || die "$word has a character that no name has"
  done
  for word in "${main_flags[@]}"; do
    [[ $word != *[[:cntrl:]]* ]] || die "$(printf 'the flag %q holds a control character' "$word")"
  done
  positive slices "$slices"
  positive max_restarts "$max_restarts"
  [[ -z $bucket || -n $service_account ]] || die '--bucket needs --service_account; see --help'
  if [[ -n $gpu ]]; then
    needs hosts
    [[ $slices == 1 ]] || die '--slices goes with --tpu'
    chips=${chips:-8}
  else
    needs topology
    [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || die "--topology $topology must be like 4x8"
    for word in ${topology//x/ }; do size=$((size * word)); done
    chips=${chips:-4}
    positive chips "$chips"
    ((size % chips == 0)) || die "--topology $topology has $size chips, no multiple of --chips $chips"
    hosts=$((size / chips))
  fi
  positive chips "$chips"
  positive hosts "$hosts"
}

# The nodes, as a nodeSelector and what the container asks for.
selector() {
  if [[ -n $tpu ]]; then
    echo "cloud.google.com/gke-tpu-accelerator: $tpu"
    echo "cloud.google.com/gke-tpu-topology: $topology"
  else
    echo "cloud.google.com/gke-accelerator: $gpu"
  fi
  if $spot; then echo 'cloud.google.com/gke-spot: "true"'; fi
}

indent() {
  local spaces
  spaces=$(printf "%$1s" '')
  sed "s/^/$spaces/"
}

tolerations() {
  echo '- {key: google.com/tpu, operator: Exists, effect: NoSchedule}'
  echo '- {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}'
  if $spot; then
    echo '- {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}'
  fi
}

arguments() {
  local word
  for word in "${main_flags[@]}"; do
    printf -- '- '
    string "$word"
    echo
  done
}

# A TPU slice is a node pool, and belongs to one job.
annotations() {
  if [[ -n $tpu ]]; then
    echo 'annotations:'
    echo '  alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool'
  fi
}

pod_metadata() {
  if [[ -n $bucket ]]; then
    echo 'metadata:'
    echo '  annotations:'
    echo '    gke-gcsfuse/volumes: "true"'
  fi
}

volumes() {
  cat <<VOLUMES
- name: memory
  emptyDir: {medium: Memory}
VOLUMES
  [[ -n $bucket ]] && cat <<VOLUMES
- name: bucket
  csi:
    driver: gcsfuse.csi.storage.gke.io
    volumeAttributes: {bucketName: $bucket, mountOptions: implicit-dirs}
VOLUMES
  return 0
}

mounts() {
  # NCCL's shared memory: a pod has 64 MiB of it otherwise.
  echo '- {name: memory, mountPath: /dev/shm}'
  if [[ -n $bucket ]]; then echo '- {name: bucket, mountPath: /bucket}'; fi
}

manifest() {
  local resource=google.com/tpu platforms=tpu,cpu
  [[ -z $gpu ]] || resource=nvidia.com/gpu platforms=cuda,cpu
  cat <<MANIFEST
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  namespace: $namespace
$(annotations | indent 2)
spec:
  failurePolicy:
    maxRestarts: $max_restarts
    rules:
    - name: mistake
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
      onJobFailureMessagePatterns: ['exit code $MISTAKE ']
    - name: saved
      action: RestartJobSetAndIgnoreMaxRestarts
      onJobFailureReasons: [PodFailurePolicy]
      onJobFailureMessagePatterns: ['exit code $STOPPED ']
    - name: absent
      action: RestartJobSetAndIgnoreMaxRestarts
      onJobFailureReasons: [PodFailurePolicy]
      onJobFailureMessagePatterns: ['exit code $ABSENT ']
    - name: disrupted
      action: RestartJobSetAndIgnoreMaxRestarts
      onJobFailureReasons: [PodFailurePolicy]
      onJobFailureMessagePatterns: ['has condition DisruptionTarget ']
  replicatedJobs:
  - name: host
    replicas: $slices
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {containerName: afi-flax, operator: In, values: [$MISTAKE, $ABSENT, $STOPPED]}
          - action: FailJob
            onPodConditions: [{type: DisruptionTarget, status: "True"}]
        template:
$(pod_metadata | indent 10)
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120
${service_account:+            serviceAccountName: $service_account}
            nodeSelector:
$(selector | indent 14)
            tolerations:
$(tolerations | indent 12)
            volumes:
$(volumes | indent 12)
            containers:
            - name: afi-flax
              image: $image
              args:
$(arguments | indent 14)
              env:
              # What each process finds the others by; GKE adds its own variables for TPUs.
              - name: JOBSET_NAME
                valueFrom: {fieldRef: {fieldPath: "metadata.annotations['jobset.sigs.k8s.io/jobset-name']"}}
              - name: JOBSET_JOB
                valueFrom: {fieldRef: {fieldPath: "metadata.annotations['jobset.sigs.k8s.io/replicatedjob-name']"}}
              - {name: JOBSET_HOSTS, value: "$hosts"}
              # Without the accelerator, JAX would take the CPU and say little of it.
              - {name: JAX_PLATFORMS, value: "$platforms"}
              resources:
                limits: {$resource: $chips}
              volumeMounts:
$(mounts | indent 14)
MANIFEST
}

# Without the empty lines of what is not there.
print_manifest() {
  check
  manifest | sed '/^ *$/d'
}

kube() {
  run kubectl --namespace "$namespace" "$@"
}

run_jobset() {
  local text
  text=$(print_manifest)
  if $dry_run; then
    quoted kubectl --namespace "$namespace" apply -f -
    printf '%s\n' "$text"
    return
  fi
  # One that has ended stays; it must go before its name can be used again.
  if [[ -n $(kubectl --namespace "$namespace" get jobset "$name" --ignore-not-found \
    -o 'jsonpath={.status.terminalState}') ]]; then
    kubectl --namespace "$namespace" delete jobset "$name"
  fi
  kubectl --namespace "$namespace" apply -f - <<<"$text"
}

case $action in
  build)
    needs image
    accelerator=tpu
    [[ -z $gpu ]] || accelerator=cuda
    run docker build --build-arg "ACCELERATOR=$accelerator" -f "$root/launch/Dockerfile" \
      -t "$image" "$root"
    run docker push "$image"
    ;;
  manifest) print_manifest ;;
  run) run_jobset ;;
  logs)
    kube logs --follow --tail=-1 --selector \
      "jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    ;;
  status) kube get jobset,pods --selector "jobset.sigs.k8s.io/jobset-name=$name" ;;
  delete) kube delete jobset "$name" ;;
  *) die "action $action must be build, manifest, run, logs, status or delete" ;;
esac
