#!/usr/bin/env bash
# Installs what building, testing and the demo need, where it is missing: Debian packages (as root) and the parts
# of the Rust toolchain. Does nothing, quickly, where everything is there.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

# program=package
readonly TOOLS=(
    cc=build-essential
    qemu-system-x86_64=qemu-system-x86
    qemu-img=qemu-utils qemu-io=qemu-utils qemu-nbd=qemu-utils
    qemu-storage-daemon=qemu-system-common
    nbdkit=nbdkit nbdinfo=libnbd-bin nbdcopy=libnbd-bin nbdfuse=libnbd-bin nbd-server=nbd-server nbd-client=nbd-client
    gnutls-cli=gnutls-bin psktool=gnutls-bin pkg-config=pkg-config
    fio=fio
    debootstrap=debootstrap mkfs.ext4=e2fsprogs debugfs=e2fsprogs mkfs.xfs=xfsprogs xfs_io=xfsprogs
    losetup=mount setpriv=util-linux
    shellcheck=shellcheck
)

missing_packages() {
    local entry
    for entry in "${TOOLS[@]}"; do
        command -v "${entry%%=*}" >/dev/null || echo "${entry#*=}"
    done
    # OpenSSL's headers, for TLS with pre-shared keys.
    pkg-config --exists openssl 2>/dev/null || printf '%s\n' libssl-dev
    # Debian's own Python: another one that comes first in the path would not find libnbd.
    /usr/bin/python3 -c 'import nbd' 2>/dev/null || printf '%s\n' python3 python3-libnbd
}

# install_missing: installs what is missing, if anything is.
install_missing() {
    local packages log
    mapfile -t packages < <(missing_packages | sort -u)
    ((${#packages[@]} > 0)) || return 0
    [[ $(id -u) == 0 ]] || die "missing Debian packages: ${packages[*]}; run scripts/setup.sh as root, or install them"
    command -v apt-get >/dev/null ||
        die "missing programs of the Debian packages ${packages[*]}, and there is no apt-get here: install them"
    say "setup: installing ${packages[*]}"
    log=$(mktemp)
    install_packages() {
        DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${packages[@]}" >"$log" 2>&1
    }
    # The lists may be absent or old: they are fetched only then.
    install_packages || { apt-get update >"$log" 2>&1 && install_packages; } || {
        tail -n 20 "$log" >&2
        rm -f "$log"
        die "apt-get could not install ${packages[*]}"
    }
    rm -f "$log"
}

install_missing
# Again, because installing a package can remove another that was there: QEMU's emulator of this release cannot
# stand beside the utilities of a later one.
install_missing
mapfile -t missing < <(missing_packages | sort -u)
((${#missing[@]} == 0)) || die "still missing after the installation: ${missing[*]}"

command -v cargo >/dev/null || die "cargo is missing: install Rust (rust-toolchain.toml names the channel) with rustup"
for component in fmt clippy; do
    if ! (cd "$project_dir" && cargo "$component" --version >/dev/null 2>&1); then
        command -v rustup >/dev/null || die "cargo $component is missing, and there is no rustup to add it"
        say "setup: adding cargo $component"
        name=$component
        [[ $component == fmt ]] && name=rustfmt
        (cd "$project_dir" && rustup component add "$name" >&2)
    fi
done
