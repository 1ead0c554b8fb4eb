#!/bin/sh
# The index's tests on an emulated AArch64 processor, its kernels also on one without dot products of bytes. Needs Debian's
# gcc-aarch64-linux-gnu and qemu-user, and `rustup target add aarch64-unknown-linux-gnu`:
#   tests/suites/aarch64.sh [CARGO-TARGET-DIR, default target/aarch64]
set -eu
cd "$(dirname "$0")/../.."
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER='qemu-aarch64 -L /usr/aarch64-linux-gnu'
tests() { # processor, which tests
    QEMU_CPU=$1 cargo test --release --package vexfs-index --lib --target aarch64-unknown-linux-gnu \
        --target-dir "$target" "$2"
}
target=${1:-target/aarch64}
tests max ''
tests cortex-a57 kernels
