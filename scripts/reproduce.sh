#!/usr/bin/env bash
# Repeats the paper's comparisons at a small scale on CPUs: installs the packages and trains every run
# that is not finished yet (with Megatron's trainer, 0.12M parameters, and the standard library's
# text). You can stop it at any time; the same command continues.
#
# Usage: ./scripts/reproduce.sh [--only NAME ...] [--of LABEL ...] [--out DIR] [--iters N]
#                               [--jobs N] [--dry-run] [-- FLAG ...]
#   --only NAME ...  only these comparisons: toy, optimizers, ablations, recipes, grid, "large rates",
#                    burst, robustness, length, "batch size", beta, schedule, "lr x weight decay",
#                    layers (default: all before robustness)
#   --of LABEL ...   only these rows, such as S3 AdamW "NAdam, warmup 30 %" (default: all)
#   --out DIR        folder for the results; each run gets a folder with run.json and metrics.jsonl
#                    (default: runs/reproduce)
#   --sizes SIZE ... of length: 0.12M, 0.8M, 3M (parameters; default: 0.12M)
#   --lengths N ...  of length: tokens a parameter (default: 20 100)
#   --settings VALUE ...
#                    of "batch size" to layers: only these values, such as 64 0.98
#   --seeds N        at most so many seeds of a run (default: 3)
#   --known FILE ... report.json of finished runs, which are not trained again
#   --iters N        iterations of a run (default: 600, or those of the configuration)
#   --jobs N         number of runs at the same time (default: the number of cores)
#   --dry-run        print the runs that are known so far, with their arguments, and the hours of length
#   -- FLAG ...      Megatron's flags for every run: -- --hidden-size 128 --num-layers 4
#   --config NAME ...
#                    train the same runs with a configuration (and overlays), through megatron-s3 launch
#   --slurm          with --config: submit a job for each run that is known; when the jobs have ended,
#                    the same command records them and submits the runs that depend on them
#   MEGATRON_S3_PYTHON names a Python that is used unchanged.
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

ensure_venv quickstart
"$PYTHON" -m scripts.experiments.runner "$@"
