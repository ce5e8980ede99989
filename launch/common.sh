# Shared by the launchers; sourced, not run.
# shellcheck shell=bash disable=SC2034

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=false

# Exit status of afi_flax.main (see its docstring) that a launcher tells apart.
readonly MISTAKE=2 STOPPED=75

die() {
  printf 'error: %s\n' "$*" >&2
  exit "$MISTAKE"
}

# Prints the help, which is the comment at the top of the launcher, without the comment signs.
help() {
  sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"
  exit 0
}

quoted() {
  local words
  words=$(printf '%q ' "$@")
  printf '%s\n' "${words% }"
}

# Runs a command, or prints it where --dry_run is given.
run() {
  if $dry_run; then quoted "$@"; else "$@"; fi
}

# The value of a flag: value NAME "$@", where $1 is --NAME=VALUE or $1 $2 are --NAME VALUE.
value() {
  [[ $# -ge 2 ]] || die "$1 needs a value"
  printf '%s' "$2"
}

needs() {
  local wanted
  for wanted in "$@"; do
    [[ -n ${!wanted} ]] || die "--$wanted is missing; see --help"
  done
}

positive() {
  [[ $2 =~ ^[1-9][0-9]{0,5}$ ]] || die "--$1 $2 must be a whole number from 1"
}

# What Kubernetes, Google Cloud and SLURM all take for a name.
good_name() {
  [[ $2 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    die "--$1 $2 must be lower-case letters, digits and -, at most 40, beginning with a letter"
}
