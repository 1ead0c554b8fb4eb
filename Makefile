# The two commands: `make demo` and `make test`. Each installs what it needs by package name and needs only Debian with
# the Rust toolchain (and root, or sudo, for packages that are missing).

SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
# What is missing: fuse3 has fusermount3, util-linux setpriv, the mkfs are for full disks, gcc the linker.
PACKAGES := $(shell command -v fusermount3 >/dev/null || echo fuse3) \
            $(shell command -v setpriv >/dev/null || echo util-linux) \
            $(shell command -v mkfs.ext4 >/dev/null || echo e2fsprogs) \
            $(shell command -v mkfs.xfs >/dev/null || echo xfsprogs) \
            $(shell command -v mkfs.btrfs >/dev/null || echo btrfs-progs) \
            $(shell command -v rsync >/dev/null || echo rsync) \
            $(shell command -v cc >/dev/null || echo gcc libc6-dev)

# How much stack the daemons of the tests on a mount took, by operation.
STACKS := $(or $(CARGO_TARGET_DIR),target)/tmp/stacks

.PHONY: test demo packages

packages:
	@if [ -n "$(strip $(PACKAGES))" ]; then \
		$(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends $(PACKAGES); \
	fi
	@# Where udev runs, the package fuse3 opens /dev/fuse to all users; a bare container has no udev.
	@if [ -c /dev/fuse ] && [ "$$(stat -c %a /dev/fuse)" != 666 ]; then $(SUDO) chmod 666 /dev/fuse; fi

test: packages
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	rm -f $(STACKS)
	VEXFS_REQUIRE_FUSE=$(if $(wildcard /dev/fuse),1) cargo test --workspace --locked
	@sort -rn $(STACKS) | awk '!seen[$$2]++ { printf "%s%s %s", n++ ? ", " : "most stack, bytes: ", $$2, $$1 } END { print "" }'
	cargo test -p vexfs-store --features schedules --lib --locked schedules

demo: packages
	cargo build --release --locked -p vexfs
	./examples/demo.sh target/release/vexfs
