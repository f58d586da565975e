# What the scripts share: where things are, how to say something, what must be there. Sourced, never run.
# shellcheck shell=bash

scripts_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
project_dir=$(dirname "$scripts_dir")
target_dir=${CARGO_TARGET_DIR:-$project_dir/target}
[[ $target_dir == /* ]] || target_dir="$project_dir/$target_dir"

# Debian's system directories are not always in the path of a user's shell.
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin:$HOME/.cargo/bin"

# shellcheck disable=SC2034  # Used by those who source this.
if [[ -t 2 && -z ${NO_COLOR:-} ]]; then
    bold=$'\e[1m' dim=$'\e[2m' red=$'\e[31m' green=$'\e[32m' plain=$'\e[0m'
else
    bold='' dim='' red='' green='' plain=''
fi

# say TEXT: one line of progress on stderr, so that stdout stays what the script is asked for.
say() { printf '%s\n' "${dim}$*${plain}" >&2; }

# die TEXT: what failed, on what, and what to do.
die() {
    printf '%s\n' "${red}error:${plain} $*" >&2
    exit 1
}

# require_tools NAME...: fails with the names of the programs that are missing.
require_tools() {
    local missing=() tool
    for tool in "$@"; do
        command -v "$tool" >/dev/null || missing+=("$tool")
    done
    ((${#missing[@]} == 0)) || die "missing: ${missing[*]}; run scripts/setup.sh as root, which installs it"
}
