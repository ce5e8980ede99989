#!/usr/bin/env bash
# Trains or evaluates on a Cloud TPU VM slice, on all its hosts.
#
#   launch/tpu_vm.sh ACTION --name NAME --zone ZONE [--project P] [--dry_run]
#     [--type v5litepod-32] [--runtime v2-alpha-tpuv5-lite] [--spot] [--queue]
#     [--bucket BUCKET] [-- FLAGS OF afi_flax.main]
#
#   create   makes the slice (--type and --runtime; --spot: cheaper, may be taken away at any time)
#   queue    the same, waiting in Google's queue until there is one
#   copy     brings the files of this repository to every host and installs what they need
#   run      runs afi_flax.main with these flags on every host; where it runs already, follows it
#   stop     makes the run save and stop
#   resume   whatever is missing of create (or queue, with --queue), copy and run; and where the slice
#            is taken away meanwhile, deletes what is left of it and does so again
#   status   the state of the slice
#   delete   the slice, and what asked for it in the queue
#
#   --bucket  is mounted on every host as ~/bucket, for data: --config.data.data_dir=bucket/...
#
# Give a --workdir in a bucket, gs://BUCKET/FOLDER, or on a file system that all hosts share. The same
# `resume` command goes on with a run that was stopped. Exit status: that of afi_flax.main on the
# first host. A run goes on when the connection to it breaks.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

action=${1---help}
[[ $action != --help && $action != -h ]] || help
shift
name='' zone='' project='' type='' runtime='' bucket='' spot=false queue=false
parse 'name zone project type runtime bucket' 'spot queue' "$@"
needs name zone
bucket=${bucket#gs://}
good_name name "$name"

where=(--zone="$zone" --quiet)
[[ -z $project ]] || where+=(--project="$project")
kind=(--spot)
$spot || kind=()

on_all() {
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"
}

# The slice's state, such as READY or PREEMPTED; nothing where there is none.
state() {
  gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(state)' 2>/dev/null ||
    true
}

create() {
  needs type runtime
  run gcloud compute tpus tpu-vm create "$name" "${where[@]}" \
    --accelerator-type="$type" --version="$runtime" "${kind[@]}"
}

# Of the request in the queue, such as WAITING_FOR_RESOURCES or ACTIVE; nothing where there is none.
queue_state() {
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    --format='value(state.state)' 2>/dev/null || true
}

queue() {
  local now=''
  needs type runtime
  $dry_run || now=$(queue_state)
  case $now in
    '' | ACTIVE | WAITING_FOR_RESOURCES | ACCEPTED | PROVISIONING | CREATING) ;;
    *) delete; now='' ;; # FAILED, SUSPENDED: it will not come any more
  esac
  [[ -n $now ]] || run gcloud compute tpus queued-resources create "$name" "${where[@]}" \
    --node-id="$name" --accelerator-type="$type" --runtime-version="$runtime" "${kind[@]}"
  $dry_run || until [[ $(state) == READY ]]; do
    now=$(queue_state)
    case $now in
      FAILED) die "the request for $name has failed; gcloud compute tpus queued-resources describe" ;;
      SUSPENDED) queue; return ;; # taken away before it was seen to be there
    esac
    printf 'waiting for %s: %s\n' "$name" "$now" >&2
    sleep 30
  done
}

copy() {
  local archive install
  archive=${TMPDIR:-/tmp}/afi_flax-$name.tar.gz
  if ! $dry_run; then
    rm -f "$archive" # of an earlier call
    # Files that git knows or does not ignore, as they are now: no .venv, no runs.
    git -C "$root" ls-files -z --cached --others --exclude-standard |
      tar -C "$root" --null --ignore-failed-read -czf "$archive" -T - || return
  fi
  run gcloud compute tpus tpu-vm scp "$archive" "$name:afi_flax.tar.gz" "${where[@]}" --worker=all || return
  install='set -e; mkdir -p afi_flax; tar -xzf afi_flax.tar.gz -C afi_flax; cd afi_flax'
  # shellcheck disable=SC2016
  install+='; export PATH=$HOME/.local/bin:$PATH'
  install+='; command -v uv || curl -LsSf https://astral.sh/uv/install.sh | sh'
  install+='; [ -x .venv/bin/python ] || uv venv --quiet --python 3.12 .venv'
  install+="; uv pip install --quiet -e '.[tpu,gcs]'"
  [[ -z $bucket ]] || install+="; launch/tpu_worker.sh mount $bucket"
  on_all "$install"
}

# Starts or follows the run on all hosts; its exit status is that of the first host's process.
run_main() {
  local status
  on_all "cd afi_flax && launch/tpu_worker.sh run $(quoted "${main_flags[@]}")" || true
  $dry_run && return
  status=$(gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=0 \
    --command='afi_flax/launch/tpu_worker.sh status' | tail -n 1) || status=''
  [[ $status =~ ^[0-9]+$ ]] || return 1
  return "$status"
}

delete() {
  # A request stays when only its slice goes, and keeps the name and the quota.
  if $queue || { ! $dry_run && [[ -n $(queue_state) ]]; }; then
    run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force
  else
    run gcloud compute tpus tpu-vm delete "$name" "${where[@]}"
  fi
}

resume() {
  local now status
  while true; do
    now=''
    $dry_run || now=$(state)
    if [[ $now != READY ]]; then
      case $now in
        '') ;;
        CREATING | STARTING | RESTARTING | REPAIRING) sleep 30; continue ;;
        *) $queue || delete ;; # PREEMPTED, TERMINATED: nothing starts it again
      esac
      if $queue; then queue; else create; fi
    fi
    status=0
    { copy && run_main; } || status=$?
    # Only a slice that was taken away is a reason to begin again.
    if $dry_run || [[ $(state) == READY ]]; then return "$status"; fi
    printf '%s was taken away; beginning again\n' "$name" >&2
  done
}

case $action in
  create) create ;;
  queue) queue ;;
  copy) copy ;;
  run) run_main ;;
  stop) on_all 'afi_flax/launch/tpu_worker.sh stop' ;;
  resume) resume ;;
  status) run gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(state)' ;;
  delete) delete ;;
  *) die "action $action must be create, queue, copy, run, stop, resume, status or delete" ;;
esac
