#!/usr/bin/env bash
# Checks in under 10 minutes whether S3 is correct and fast on a machine with NVIDIA GPUs.
#
# Usage: ./scripts/gpu_acceptance.sh [--wheels DIR | --carried DIR] [OPTIONS]
#        ./scripts/gpu_acceptance.sh --carry DIR
#   --wheels DIR       install only from the wheels in DIR, without a network
#   --carried DIR      the same with a folder that --carry has filled
#   --carry DIR        fill DIR for a machine without a network and git, and do nothing else
#   --only SECTION...  run only these sections: environment prepare training kernels graphs sanitizer
#                      suite memory speed gpt
#   --skip SECTION...  run all sections but these
#   --limit SECONDS    time limit for everything, from the start of this script (default: 600)
#   --output DIR       folder for the results (default: acceptance/DATE-HOST)
#   --shards FILE      shards that are known, so that Megatron is not asked for them
#   --data PREFIX      dataset for the 64M GPT (default: the bytes of Python's standard library)
#   --cpu              rehearse on the CPU the sections that can run there
#
# It prints a table of the checks that passed, failed or were skipped (with the reason), and last
# those that failed or missed one of the project's targets for speed.  The output folder holds at most
# eight files: acceptance.txt and .json, bench_step.json, .txt and .png, gpt.json, and logs.tgz with
# the log of each section.  They are written anew whenever something is known, so that a run that is
# stopped leaves what it has found.  Sections that time nothing run side by side; each is a process
# with a time limit, so that a crash or a CUDA error ends only that section.  The time that is left
# at the end trains a GPT with 64M parameters.
#
# Exit status: 0 if nothing failed (a missed target is no failure), 1 if something failed, 2 if there
# is no GPU or the script cannot start.
#
# Packages are installed from the network into .venv, as by scripts/test.sh.  MEGATRON_S3_PYTHON
# names a Python that is used unchanged, for instance that of a container with its own torch,
# Transformer Engine and Apex.  For a machine without a network, prepare a folder on another machine
# with the same Python and system, and take it along:
#
#   ./scripts/gpu_acceptance.sh --carry carried
#   MEGATRON_S3_PYTHON=python3 ./scripts/gpu_acceptance.sh --carried carried
#
# It holds the packages that a Python with torch, NumPy and Triton lacks, the commit, the shards that
# are measured, and a dataset (22 MiB, ignored by git).  The packages are added to the path of
# that Python, which stays unchanged.  Without MEGATRON_S3_PYTHON an environment is created from the
# wheels alone, which then have to be all that is needed (about 3 GB):
#
#   python3.12 -m pip download --only-binary=:all: -d wheels \
#     torch==2.13.0 megatron-core==0.19.2 numpy psutil pyyaml matplotlib tensorboard pytest hypothesis
#
# If a package (megatron-core, matplotlib, pytest, ...) is missing, only its section is skipped.
# Triton also needs a C compiler and Python's headers.
set -euo pipefail

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

export MEGATRON_S3_ACCEPTANCE_STARTED=${EPOCHREALTIME/,/.}
wheels=''
carried=''
carry=''
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
    --carried | --carry)
      [ $# -gt 1 ] || { echo "error: $1 needs a folder; see $0 --help" >&2; exit 2; }
      if [ "$1" = --carry ]; then carry=$2; else carried=$2; fi
      shift 2
      ;;
    *) given+=("$1"); shift ;;
  esac
done
if [ -n "$carried" ]; then
  [ -f "$carried/COMMIT" ] || {
    echo "error: --carried $carried: not a folder that --carry has filled; see $0 --help" >&2
    exit 2
  }
  carried=$(cd "$carried" && pwd)
  wheels=$carried/wheels
  export MEGATRON_S3_COMMIT=$carried/COMMIT
  given=(--shards "$carried/shards.json" --data "$carried/data/std" ${given[@]+"${given[@]}"})
fi
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

# from_wheels: sets PYTHON and WHEELS_PATH so that the wheels are used, and nothing is downloaded.
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
    echo "error: the wheels of $wheels could not be installed; pip's messages are above. They must" >&2
    echo "       be for this Python and system, one version of each package; see $0 --help." >&2
    exit 2
  }
else
  ensure_venv quickstart,test || exit 2
fi
export PYTHONPATH="$repo${WHEELS_PATH:+:$WHEELS_PATH}${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" -c 'import torch, yaml' || {
  echo "error: $PYTHON lacks torch or PyYAML, which S3 needs; see $0 --help about wheels." >&2
  exit 2
}
cd "$from"
[ -z "$carry" ] || exec "$PYTHON" -m scripts.acceptance.carry "$carry"
exec "$PYTHON" -m scripts.acceptance ${given[@]+"${given[@]}"}
