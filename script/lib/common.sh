# shellcheck shell=bash
# Shared by the scripts beside it: where things are, how to speak, how to become root. Sourced, never run.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck disable=SC2034
venv=$repo/.venv
# shellcheck disable=SC2034
engines=$repo/.venv-engines
cache=${MEMKV_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/memkv}
me=$(basename "$0")

say() { printf '%s: %s\n' "$me" "$*" >&2; }
die() { say "$*"; exit 1; }

# usage: print the comment that opens the calling script.
usage() { awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"; }

# as_root CMD...: run CMD as root, through sudo where we are somebody else.
as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# can_root: true if as_root works without asking for a password.
can_root() { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }

# digest FILE...: one hash over the names and the contents.
digest() { sha256sum "$@" | sha256sum | cut -c 1-16; }

# distribution: debian, ubuntu or whatever else os-release says.
distribution() { (. /etc/os-release 2>/dev/null && echo "${ID:-unknown}") || echo unknown; }

apt_get() { as_root env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -q "$@" >&2; }

# apt_refresh: update apt's lists, at most once an hour. It may fail: the lists at hand may do.
apt_refresh() {
    [ -z "$(find "$cache/apt-refreshed" -mmin -60 2>/dev/null)" ] || return 0
    if can_root && apt_get update; then touch "$cache/apt-refreshed"; else say "apt's lists could not be updated"; fi
}

# apt_knows PACKAGE: true if apt has a version of it to install.
apt_knows() { [ -n "$(apt-cache madison "$1" 2>/dev/null)" ]; }
