#!/usr/bin/env bash
# Sets up .venv, then checks and tests everything that can run on this machine, fast things first.
#
# Usage: ./scripts/test.sh [PYTEST ARGUMENTS]
#   With arguments: one run of pytest with them, after the checks; for instance -m 'not slow'
#   (fast ones alone) or -m thorough (the cases that a run without arguments leaves out).
#   MEGATRON_S3_PYTHON names a Python to use as it is, with the packages of pyproject.toml in it.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/_venv.sh
. scripts/_venv.sh

case "${1:-}" in
  -h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac

ensure_venv quickstart,test

# The other supported releases, side by side, for the compatibility tests.
if [ -z "${MEGATRON_S3_PYTHON:-}" ]; then
  for release in 0.17.1 0.18.2; do
    target=.venv/megatron-core/$release
    [ ! -d "$target" ] || continue
    echo "installing megatron-core $release into $target"
    rm -rf "$target.part"
    "$PYTHON" -m pip install -qq --disable-pip-version-check --no-deps \
      --target "$target.part" "megatron-core==$release"
    mv "$target.part" "$target"
  done
fi

echo "ruff"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
echo "mypy"
"$PYTHON" -m mypy
echo "shellcheck"
"$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')/shellcheck" -x scripts/*.sh scripts/*.sbatch docker/*.sh tests/*/*.sh .ci/run

# pytest's status 5 says that it found no test of that kind, which is no failure.
run_pytest() {
  local status=0
  "$PYTHON" -m pytest "$@" || status=$?
  [ "$status" = 5 ] || return "$status"
}

if [ $# -gt 0 ]; then
  run_pytest "$@"
else
  # A file's tests stay together in one process, which has made what they share once.
  run_pytest -q -n 2 --dist loadfile -m "not slow and not thorough and not cluster and not container"
  run_pytest -q -m "slow and not thorough and not cluster and not container" --durations=10
  run_pytest -q -m "cluster and not container" --durations=5 -rs
  run_pytest -q -m container --durations=5 -rs
fi
