#!/usr/bin/env bash
# Trains or evaluates on GPU nodes of a SLURM cluster: one process a node, with all its GPUs.
#
#   launch/slurm.sh --name NAME --nodes N --gpus N [--dry_run] [--partition P] [--account A]
#     [--time T] [--cpus N] [--stop_before SECONDS] -- FLAGS OF afi_flax.main
#
#   --name         of the job; a second job of this name waits until the first has ended
#   --nodes        how many
#   --gpus         of each node
#   --partition, --account, --time, --cpus (of each node)  as for sbatch; without, the cluster's own
#   --stop_before  seconds before the time limit (or a preemption with a grace time) at which the run
#                  saves and stops; 120 without
#   --dry_run      prints what would run
#
# The environment that the command is given in (.venv of this folder, or what is active) must be there
# on all nodes, and --workdir must be shared. A preempted job, and one that reached its time limit, is
# queued again by itself and goes on; so does the same command after anything else.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name='' nodes='' gpus='' partition='' account='' time='' cpus='' stop_before=120
parse 'name nodes gpus partition account time cpus stop_before' '' "$@"
needs name nodes gpus
good_name name "$name"
positive nodes "$nodes"
positive gpus "$gpus"
positive stop_before "$stop_before"

options=(
  --job-name="$name" --dependency=singleton
  --nodes="$nodes" --ntasks-per-node=1 --gpus-per-node="$gpus"
  --requeue --open-mode=append --output="$name-%j.log"
  --signal="TERM@$stop_before" # to the job's steps, and so to every process
  --chdir="$root"
)
[[ -z $partition ]] || options+=(--partition="$partition")
[[ -z $account ]] || options+=(--account="$account")
[[ -z $time ]] || options+=(--time="$time")
[[ -z $cpus ]] || options+=(--cpus-per-task="$cpus")
run sbatch "${options[@]}" "$root/launch/slurm_job.sh" "${main_flags[@]}"
