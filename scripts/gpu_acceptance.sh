#!/usr/bin/env bash
# Is this machine with NVIDIA GPUs fit for S3, and is S3 right and fast on it?  Under 10 minutes.
#
# Usage: ./scripts/gpu_acceptance.sh [--wheels DIR] [OPTIONS]
#   --wheels DIR       install from the wheels in DIR alone: no network
#   --only SECTION...  environment kernels memory graphs training speed sanitizer suite
#   --skip SECTION...  all but these
#   --limit SECONDS    for everything together (default: 600)
#   --output DIR       (default: acceptance/DATE-HOST)
#   --cpu              rehearse on the CPU what can run there
#
# It prints a table of what passed, failed and was skipped (and why), with the project's bars for
# speed beside what was measured, met or missed; and writes acceptance.json and .txt, pictures, and
# a log of each section to the output folder.  Each section is a process of its own with a time
# limit: a crash or a CUDA error ends that section alone.
#
# Exit status: 0, nothing failed (a missed bar is no failure); 1, something failed; 2, no GPU, or it
# cannot start.
#
# Packages: .venv is made and filled from the network, as by scripts/test.sh.  MEGATRON_S3_PYTHON
# names a Python to use as it is: a container's, say, with its own torch, Transformer Engine, Apex.
# Without a network, carry wheels.  Where there is one, for the same Python and system, either all
#
#   python3.12 -m pip download --only-binary=:all: -d wheels \
#     torch==2.13.0 megatron-core==0.19.2 numpy psutil pyyaml matplotlib tensorboard pytest hypothesis
#
# (about 3 GB), or only what a machine's own Python with torch lacks (--no-deps; about 5 MB):
#
#   python3.12 -m pip download --only-binary=:all: --no-deps -d wheels \
#     megatron-core==0.19.2 psutil pyyaml hypothesis sortedcontainers
#   MEGATRON_S3_PYTHON=python3 ./scripts/gpu_acceptance.sh --wheels wheels
#
# The first makes an environment of the wheels; in the second they are laid over that Python, which
# stays as it is.  What is missing (megatron-core, matplotlib, pytest, ...) costs its section alone.
# Triton needs a C compiler and Python's headers, with wheels too.
set -euo pipefail

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

wheels=
given=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --wheels)
      [ $# -gt 1 ] || { echo "error: --wheels needs a folder; see $0 --help" >&2; exit 2; }
      wheels=$2
      shift 2
      ;;
    --wheels=*) wheels=${1#*=}; shift ;;
    *) given+=("$1"); shift ;;
  esac
done
if [ -n "$wheels" ]; then
  [ -n "$(find "$wheels" -maxdepth 1 -name '*.whl' 2>/dev/null | head -1)" ] || {
    echo "error: --wheels $wheels: no folder with wheels (*.whl) in it; see $0 --help" >&2
    exit 2
  }
  wheels=$(cd "$wheels" && pwd)
fi

# The user's paths are relative to where the user is.
from=$PWD
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$repo"
# shellcheck source=scripts/_venv.sh
. scripts/_venv.sh

# from_wheels: sets PYTHON and WHEELS_PATH to what has the wheels, and nothing from elsewhere.
from_wheels() {
  local folder python
  folder=$PWD/.venv/wheels-$({ ls -l "$wheels" && echo "${MEGATRON_S3_PYTHON:-}"; } | sha256sum | head -c 12)
  python=${MEGATRON_S3_PYTHON:-}
  local install=(-m pip install -q --disable-pip-version-check --no-index --no-deps)
  if [ -n "$python" ]; then
    PYTHON=$python
    WHEELS_PATH=$folder
    [ ! -e "$folder" ] || return 0
    rm -rf "$folder.part"
    "$PYTHON" "${install[@]}" --target "$folder.part" "$wheels"/*.whl || return 1
    mv "$folder.part" "$folder"
    return
  fi
  PYTHON=$folder/bin/python
  [ ! -e "$folder/installed" ] || return 0
  rm -rf "$folder"
  python=$(_find_python) || return 1
  "$python" -m venv "$folder"
  "$PYTHON" "${install[@]}" "$wheels"/*.whl || return 1
  touch "$folder/installed"
}

WHEELS_PATH=
if [ -n "$wheels" ]; then
  from_wheels || {
    echo "error: the wheels of $wheels could not be installed; what pip says is above. They have to" >&2
    echo "       be for this Python and system, one version of each package; see $0 --help." >&2
    exit 2
  }
else
  ensure_venv quickstart,test || exit 2
fi
export PYTHONPATH="$repo${WHEELS_PATH:+:$WHEELS_PATH}${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" -c 'import torch, yaml' || {
  echo "error: $PYTHON lacks a package that S3 itself needs; see $0 --help about wheels." >&2
  exit 2
}
cd "$from"
exec "$PYTHON" -m scripts.acceptance ${given[@]+"${given[@]}"}
