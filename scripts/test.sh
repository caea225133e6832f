#!/usr/bin/env bash
# Creates .venv, then runs all checks and tests that can run on this machine, fast ones first.
#
# Usage: ./scripts/test.sh [PYTEST ARGUMENTS]
#   With arguments, pytest runs once with them after the checks; for instance -m 'not slow' (only
#   fast tests) or -m thorough (the cases that a run without arguments leaves out).
#   MEGATRON_S3_PYTHON names a Python that is used unchanged; it must have the packages of
#   pyproject.toml.
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

# unpack FOLDER PACKAGE...: installs packages, without what they need, into a folder below .venv.
unpack() {
  local folder=.venv/$1
  shift
  [ ! -d "$folder" ] || return 0
  echo "installing $* into $folder"
  rm -rf "$folder.part"
  "$PYTHON" -m pip install -qq --disable-pip-version-check --no-compile --no-deps \
    --target "$folder.part" "$@" && mv "$folder.part" "$folder"
}

unpack_all() {
  [ -z "${MEGATRON_S3_PYTHON:-}" ] || return 0
  # The other supported releases, for the tests of compatibility.
  unpack megatron-core/0.17.1 megatron-core==0.17.1
  unpack megatron-core/0.18.2 megatron-core==0.18.2
  # Upstream's Muon and Lion.
  unpack emerging-optimizers/0.3.0 emerging-optimizers==0.3.0
  # Megatron-Bridge and torchtitan, with what their tests need beside the packages that are there.
  unpack megatron-bridge/0.6.2 megatron-bridge==0.6.2 \
    omegaconf==2.4.0 hydra-core==1.3.8 antlr4-python3-runtime==4.9.3 ||
    echo "megatron-bridge cannot be installed here; its tests will be skipped"
  unpack torchtitan/0.3.0 torchtitan==0.3.0 torchdata==0.11.0 torch_checkpointing==0.1.1 \
    spmd_types==0.2.3 tyro==1.0.17 docstring_parser==0.18.0 typeguard==4.6.1 ||
    echo "torchtitan cannot be installed here; its test will be skipped"
}

# Beside the checks, which take one core.
unpack_all &
unpacking=$!
trap 'kill "$unpacking" 2>/dev/null || true' EXIT

echo "ruff"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
echo "mypy"
"$PYTHON" -m mypy
echo "shellcheck"
"$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')/shellcheck" -x scripts/*.sh scripts/*.sbatch docker/*.sh tests/*/*.sh .ci/run

wait "$unpacking"

# pytest's status 5 means that it found no test of that kind, which is no failure.
run_pytest() {
  local status=0
  "$PYTHON" -m pytest "$@" || status=$?
  [ "$status" = 5 ] || return "$status"
}

if [ $# -gt 0 ]; then
  run_pytest "$@"
else
  # Images wait for their packages most of the time, so they are tested beside all others, and the
  # cluster, which waits for SLURM's clocks, beside the slow ones.  With job control on they do not
  # ignore SIGINT.
  logs=$(mktemp -d)
  trap 'kill -- $(jobs -p | sed s/^/-/) 2>/dev/null || true; rm -rf "$logs"' EXIT
  set -m
  {
    renice -n 10 -p "$BASHPID" >/dev/null
    run_pytest -q -m "container and not thorough" --durations=5 -rs
  } >"$logs/images" 2>&1 </dev/null &
  images=$!
  set +m
  # The tests of a file run in one process, which prepares what they share once.
  run_pytest -q -n 2 --dist loadfile -m "not slow and not thorough and not cluster and not container"
  set -m
  run_pytest -q -m "cluster and not container and not thorough" --durations=5 -rs \
    >"$logs/cluster" 2>&1 </dev/null &
  cluster=$!
  set +m
  status=0
  run_pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=10 \
    -m "slow and not thorough and not cluster and not container" || status=$?
  echo "waiting for the tests on a cluster, and of images"
  wait "$cluster" || status=$?
  cat "$logs/cluster"
  wait "$images" || status=$?
  cat "$logs/images"
  exit "$status"
fi
