#!/usr/bin/env bash
# The paper's comparisons at a small scale, on CPUs: sets itself up, trains every run that is not
# there yet (Megatron's trainer, 0.12M parameters, the standard library's text), and goes on where
# it was stopped.
#
# Usage: ./scripts/reproduce.sh [--only NAME ...] [--of LABEL ...] [--out DIR] [--iters N]
#                               [--jobs N] [--dry-run] [-- FLAG ...]
#   --only NAME ...  of toy, optimizers, ablations, recipes, grid, "large rates", burst (all)
#   --of LABEL ...   only these of their rows, such as S3 AdamW "NAdam, warmup 30 %" (all)
#   --out DIR        a folder for each run, with run.json and metrics.jsonl (runs/reproduce)
#   --iters N        of a run (600; of a configuration its own)
#   --jobs N         runs side by side (the number of cores)
#   --dry-run        prints the runs known so far, with their arguments
#   -- FLAG ...      Megatron's flags for every run: -- --hidden-size 128 --num-layers 4
#   --config NAME    trains the same runs of a configuration instead, through megatron-s3 launch
#   --slurm          with --config: submits a job for each run that is known; when they have ended the
#                    same command records them and submits what they decide on
#   MEGATRON_S3_PYTHON names a Python to use as it is.
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
