#!/usr/bin/env bash
# The main job as a story, on a real guest: capture a Debian machine's disk, boot it from the backup, kill the agent
# under it, wait until everything is home, and check what came home. Installs what is missing, builds, and leaves
# nothing behind but the target directory, where the guest is kept for the next time.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
cd "$project_dir"

"$scripts_dir/setup.sh"
say "building lifeboot"
cargo build --quiet --locked --release -p agent -p tests --bin lifeboot --bin lifeboot-demo
"$scripts_dir/guest.sh" >/dev/null

mkdir -p "$target_dir/e2e"
files=$(mktemp -d "$target_dir/e2e/demo.XXXXXX")
# A socket's path has 107 bytes at most, which a checkout deep in a tree would exceed.
sockets=$(mktemp -d)
demo=
# The kernel kills what the demo has started as soon as the demo is gone.
# shellcheck disable=SC2317  # The trap calls it.
finish() {
    if [[ $demo ]]; then
        kill -TERM "$demo" 2>/dev/null || true
        wait "$demo" 2>/dev/null || true
    fi
    rm -rf "$files" "$sockets"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# In the background, so that a signal is dealt with at once and not when the demo is done.
"$target_dir/release/lifeboot-demo" "$files" "$sockets" &
demo=$!
code=0
wait "$demo" || code=$?
demo=
exit "$code"
