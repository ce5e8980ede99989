# Shared by the launchers; sourced, not run.
# shellcheck shell=bash disable=SC2034

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=false
main_flags=()

# Exit status of afi_flax.main (see its docstring) that a launcher tells apart.
readonly MISTAKE=2 ABSENT=69 STOPPED=75

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

# Reads a launcher's own flags into variables of their names, and what stands behind -- into
# main_flags: parse 'FLAGS WITH A VALUE' 'FLAGS WITHOUT' "$@".
parse() {
  local with_value=" $1 " without=" dry_run $2 " flag
  shift 2
  while [[ $# -gt 0 && $1 != -- ]]; do
    [[ $1 != --help && $1 != -h ]] || help
    flag=${1%%=*} flag=${flag#--}
    if [[ ! $1 =~ ^--[a-z_]+(=|$) ]]; then
      die "$1 is not a flag of the launcher; flags of afi_flax.main go behind --"
    elif [[ $with_value == *" $flag "* && $1 == *=* ]]; then
      printf -v "$flag" '%s' "${1#*=}"
    elif [[ $with_value == *" $flag "* ]]; then
      [[ $# -ge 2 ]] || die "$1 needs a value"
      printf -v "$flag" '%s' "$2"
      shift
    elif [[ $without == *" $flag "* && $1 != *=* ]]; then
      printf -v "$flag" true
    else
      die "$1 is not a flag of the launcher; flags of afi_flax.main go behind --"
    fi
    shift
  done
  [[ ${1-} != -- ]] || shift
  main_flags=("$@")
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
