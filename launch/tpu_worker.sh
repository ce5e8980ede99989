#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on a host of a TPU VM.
#
#   run FLAGS OF afi_flax.main   starts it apart from the connection, or finds it running; follows its
#                                output and ends with its exit status
#   stop                         makes it save and stop
#   status                       prints its exit status; nothing while it runs
#   mount BUCKET                 a bucket as ~/bucket
set -euo pipefail

state=$HOME/.afi_flax
mkdir -p "$state"

running() {
  [[ -s $state/pid ]] && kill -0 "$(cat "$state/pid")" 2>/dev/null
}

run() {
  if ! running; then
    rm -f "$state/status"
    : >"$state/log"
    # The shell around it outlives SIGTERM, to write down the exit status.
    # shellcheck disable=SC2016
    setsid nohup bash -c '
      trap : TERM
      "${@:2}" >>"$1/log" 2>&1
      echo $? >"$1/status.new"
      mv "$1/status.new" "$1/status"
    ' bash "$state" "${PYTHON:-$PWD/.venv/bin/python}" -m afi_flax.main "$@" </dev/null \
      >/dev/null 2>&1 &
    echo $! >"$state/pid"
  fi
  tail --pid="$(cat "$state/pid")" -s 0.2 -n +1 -f "$state/log"
  exit "$(cat "$state/status" 2>/dev/null || echo 1)"
}

mount() {
  mkdir -p "$HOME/bucket"
  if ! command -v gcsfuse >/dev/null; then
    local key=/usr/share/keyrings/cloud.google.asc
    curl -LsSf https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update -qq
    sudo apt-get install -qq -y gcsfuse
  fi
  mountpoint -q "$HOME/bucket" || gcsfuse --implicit-dirs "$1" "$HOME/bucket"
  ln -sfn "$HOME/bucket" bucket
}

case $1 in
  run) run "${@:2}" ;;
  stop) running && kill -TERM -- "-$(cat "$state/pid")" ;;
  status) cat "$state/status" 2>/dev/null || true ;;
  mount) mount "$2" ;;
  *) echo "error: $1 must be run, stop, status or mount" >&2; exit 2 ;;
esac
