#!/usr/bin/env bash
# Everything that must hold before a change lands: formatting, lints, docs, scripts, and every test, those against a
# real guest included. Installs what is missing. All steps run, whichever fail; a summary ends the output.
#
#   scripts/test.sh            all of it
#   scripts/test.sh fmt test   only the steps named: scripts fmt clippy docs build guest test doctest fuzz
set -uo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
cd "$project_dir" || exit 1

readonly FEATURES=(--features psk)
readonly STEPS=(scripts fmt clippy docs build guest test doctest fuzz)

step_scripts() {
    local scripts=(scripts/*.sh scripts/guest/agent .ci/run) script
    for script in "${scripts[@]}"; do
        bash -n "$script" || return 1
    done
    shellcheck --external-sources "${scripts[@]}"
}
step_fmt() { cargo fmt --all --check; }
# As it is built by default, and as it is tested: with pre-shared keys, which need OpenSSL.
step_clippy() {
    cargo clippy --locked --workspace --all-targets -- -D warnings &&
        cargo clippy --locked --workspace --all-targets "${FEATURES[@]}" -- -D warnings
}
step_docs() { RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps; }
# The end-to-end tests run the binaries of other packages, which `cargo test` does not build.
step_build() {
    cargo build --locked --workspace --bins "${FEATURES[@]}" && cargo test --locked --workspace --no-run "${FEATURES[@]}"
}
step_guest() { scripts/guest.sh; }
step_test() {
    rm -rf "$target_dir/e2e"
    if cargo nextest --version >/dev/null 2>&1; then
        cargo nextest run --locked --workspace --no-fail-fast "${FEATURES[@]}"
    else
        cargo test --locked --workspace --no-fail-fast "${FEATURES[@]}" --lib --bins --tests -- --test-threads=2
    fi
}
step_doctest() { cargo test --locked --workspace --doc "${FEATURES[@]}"; }
# The fuzz targets, briefly. Outside the workspace, so they are formatted and linted by themselves.
step_fuzz() {
    local fuzz=(--manifest-path fuzz/Cargo.toml) into=(--target-dir "$target_dir")
    cargo fmt "${fuzz[@]}" --check &&
        cargo clippy "${fuzz[@]}" "${into[@]}" --all-targets -- -D warnings &&
        cargo test "${fuzz[@]}" "${into[@]}"
}

wanted=("$@")
((${#wanted[@]} > 0)) || wanted=("${STEPS[@]}")
for name in "${wanted[@]}"; do
    declare -F "step_$name" >/dev/null || die "no such step: $name; there are: ${STEPS[*]}"
done
"$scripts_dir/setup.sh" || exit 1
"$scripts_dir/newer_qemu.sh" || exit 1

began=$SECONDS
summary=()
failures=0
for name in "${wanted[@]}"; do
    say "${bold}== $name"
    step_began=$SECONDS
    if "step_$name"; then
        verdict="${green}ok${plain}    "
    else
        verdict="${red}FAILED${plain}"
        failures=$((failures + 1))
    fi
    summary+=("$(printf '%s  %-8s %5d s' "$verdict" "$name" $((SECONDS - step_began)))")
    # Nothing that follows means anything without the programs, or the guest.
    if [[ $verdict == *FAILED* && $name =~ ^(build|guest)$ ]]; then
        summary+=("        the rest was not run")
        break
    fi
done

printf '\n%s\n' "${bold}Summary${plain}"
printf '%s\n' "${summary[@]}"
printf '        %-8s %5d s\n' all $((SECONDS - began))
((failures == 0))
