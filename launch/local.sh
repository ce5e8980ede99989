#!/usr/bin/env bash
# Trains or evaluates on this machine, with all its accelerators.
#
#   launch/local.sh [--dry_run] [--processes N] -- FLAGS OF afi_flax.main
#
#   --processes N  several processes that share one run, as on N hosts: to try that out
#   --dry_run      prints what would run
#
# glibc (2.35 or later, on Linux) is asked for huge pages, unless GLIBC_TUNABLES says something else;
# --dry_run does not print that.
#
# PYTHON is the interpreter; without it that of .venv where there is one. The same command goes on
# with a run that was stopped. Exit status: that of afi_flax.main, 0 done, 2 a mistake, 74 something
# failed, such as the disk, 75 stopped by a signal with the state saved.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

processes=1
parse 'processes' '' "$@"
positive processes "$processes"

if [[ -z ${PYTHON-} ]]; then
  PYTHON=$root/.venv/bin/python
  [[ -x $PYTHON ]] || PYTHON=python3
fi
# On the CPU, XLA allocates a step's memory anew each time, and the first touch of a page costs: 47,000
# page faults a step of ResNet-32, 430 with huge pages, and 4% less of the cores' time.
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}
cd "$root"
command=("$PYTHON" -m afi_flax.main "${main_flags[@]}")

if [[ $processes == 1 ]]; then
  if $dry_run; then quoted "${command[@]}"; exit; fi
  exec "${command[@]}"
fi

# One that is free, as is the next one, which JAX takes.
port=$("$PYTHON" -c '
import socket
while True:
  with socket.socket() as one, socket.socket() as two:
    one.bind(("", 0))
    port = one.getsockname()[1]
    try:
      two.bind(("", port + 1))
    except (OSError, OverflowError):
      continue
  print(port)
  break
')
pids=()
for ((i = 0; i < processes; i++)); do
  which=(--coordinator "127.0.0.1:$port" --processes "$processes" --process "$i")
  if $dry_run; then
    quoted "${command[@]}" "${which[@]}"
  else
    "${command[@]}" "${which[@]}" &
    pids+=($!)
  fi
done
# One signal to all: they agree on the step at which they stop.
[[ ${#pids[@]} == 0 ]] || trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
status=0
for pid in "${pids[@]}"; do
  while true; do
    code=0
    wait "$pid" || code=$?
    kill -0 "$pid" 2>/dev/null || break # else the trap only interrupted the wait
  done
  [[ $status != 0 ]] || status=$code
done
exit "$status"
