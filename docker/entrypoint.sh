#!/usr/bin/env bash
# What the images start: a verb of megatron-s3's, else a program of the image's by its name or path,
# else megatron-s3, which says what it does not know.
#   IMAGE launch CONFIG --dry-run     megatron-s3 launch CONFIG --dry-run
#   IMAGE bash                        bash
#   IMAGE /usr/bin/convert            a program that is called like a verb
set -euo pipefail

# Triton, matplotlib and torch keep caches below HOME, and the root may be read-only or the user
# one that the image has never heard of.
if [ ! -d "${HOME:-}" ] || [ ! -w "$HOME" ]; then
  home=$(mktemp -d 2>/dev/null) || {
    echo "error: HOME (${HOME:-unset}) and ${TMPDIR:-/tmp} are not writable; give the container one" \
      "of them, for instance with --tmpfs /tmp" >&2
    exit 2
  }
  export HOME=$home
fi
# torch asks for the user's name, and a bare user id has none.
USER=${USER:-$(id -un 2>/dev/null || echo "uid$(id -u)")}
export USER

[ $# -gt 0 ] || set -- --help
case $1 in
  launch | plan | args | configs | data | export | convert | report | eval | hook) set -- megatron-s3 "$@" ;;
  *) type -P -- "$1" >/dev/null || set -- megatron-s3 "$@" ;;
esac
# What NGC images start with checks the driver and says what the image holds. It says so on standard
# output, which is the program's.
nvidia=/opt/nvidia/nvidia_entrypoint.sh
if [ -x "$nvidia" ]; then
  # shellcheck disable=SC2016  # the inner shell's
  exec "$nvidia" bash -c 'exec "$@" >&3 3>&-' bash "$@" 3>&1 >&2
fi
exec "$@"
