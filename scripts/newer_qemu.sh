#!/usr/bin/env bash
# QEMU's tools of a version that speaks NBD's extended headers (8.2 or newer), in target/newer-qemu: from the backports
# of this Debian release, beside the installed ones, which stay as they are. Does nothing where those are new enough,
# or where it was done before. Where they cannot be had it says so, and the tests that need them say it too.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

readonly dir=$target_dir/newer-qemu
readonly packages=(qemu-utils qemu-system-common)

# speaks_extended PROGRAM: whether this qemu-io is new enough.
speaks_extended() {
    local version
    version=$("$1" --version 2>/dev/null | sed -nE '1s/.*version ([0-9]+\.[0-9]+).*/\1/p')
    [[ -n $version ]] && printf '%s\n' 8.2 "$version" | sort --version-sort --check=quiet
}

if speaks_extended qemu-io || speaks_extended "$dir/usr/bin/qemu-io"; then
    exit 0
fi

# Downloads and unpacks them into $dir; fails where a step does.
fetch() {
    local codename site suite apt=()
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || return 1
    # shellcheck disable=SC1091
    codename=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
    suite=$codename-backports
    # shellcheck disable=SC2016  # apt-get's own word.
    site=$(apt-get indextargets --format '$(SITE)' "Codename: $codename" "Created-By: Packages" | head -n 1)
    [[ -n $codename && -n $site ]] || return 1
    mkdir -p "$dir/apt/lists/partial" "$dir/apt/packages"
    printf 'deb %s %s main\n' "$site" "$suite" >"$dir/apt/sources.list"
    apt=(-o "Dir::Etc::sourcelist=$dir/apt/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$dir/apt/lists"
        -o APT::Sandbox::User=root -o APT::Get::List-Cleanup=0 -qq)
    apt-get "${apt[@]}" update &&
        (cd "$dir/apt/packages" && apt-get "${apt[@]}" download "${packages[@]/%//$suite}") || return 1
    local package
    for package in "$dir"/apt/packages/*.deb; do
        dpkg-deb --extract "$package" "$dir" || return 1
    done
    rm -rf "$dir/apt"
    speaks_extended "$dir/usr/bin/qemu-io"
}

say "fetching a newer QEMU's tools into $dir"
if ! log=$(fetch 2>&1); then
    rm -rf "$dir"
    [[ -z $log ]] || printf '%s\n' "$log" | tail -n 5 >&2
    say "no newer QEMU can be had here: nothing tests extended headers against it"
fi
