#!/usr/bin/env bash
# What launch/slurm.sh submits: runs afi_flax.main on every node of the job, and queues the job again
# where it was stopped with its state saved. Run by sbatch from the repository.
set -uo pipefail

PYTHON=${PYTHON:-$PWD/.venv/bin/python}
[[ -x $PYTHON ]] || PYTHON=python3

# srun does not take --cpus-per-task from the job by itself (since SLURM 22.05).
if [[ -n ${SLURM_CPUS_PER_TASK-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

# srun tells each process its number by the environment. The processes end each other, and so srun
# must not: it would kill those that still save when the first one leaves.
srun --kill-on-bad-exit=0 --wait=600 "$PYTHON" -m afi_flax.main "$@"
status=$?
if [[ $status == 75 ]]; then # stopped by a signal, state saved
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
