#!/usr/bin/env bash
# From text to figures on a SLURM cluster: text -> tokens -> a job on 2 nodes, a rank of it killed ->
# requeued and resumed -> exported -> evaluated.
#
# Usage: tests/cluster/end_to_end.sh DIR     (on a node that has sbatch; for one made on the spot:
#        tests/cluster/with_cluster.sh 2 CLUSTER_DIR tests/cluster/end_to_end.sh DIR)
#   MEGATRON_S3_PYTHON names the Python of the virtual environment to use (.venv/bin/python).
#   The model is far too small for its answers to mean anything.
set -euo pipefail

mkdir -p "$1"
out=$(readlink -f "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${MEGATRON_S3_PYTHON:-$PWD/.venv/bin/python}
VENV=$(dirname "$(dirname "$python")")
export VENV RUN_DIR=$out/run PYTHONPATH=$PWD OMP_NUM_THREADS=1
megatron_s3=("$python" -m megatron_s3.cli)
step() { echo "[end to end] $(date +%T) $*"; }

step "text to tokens"
text=$("$python" -c 'import asyncio, os; print(os.path.dirname(asyncio.__file__))')
"${megatron_s3[@]}" data --input "$text" --tokenizer gpt2 --split 90,10 --output-prefix "$out/data/text"

step "a job on 2 nodes"
# In fp32: some CPUs have no bf16 products, and emulate those with a real vocabulary very slowly.
config=(tiny-s3 --set bf16=false --set launch.nodes=2 --set launch.nproc_per_node=1 --set mock_data=false
  --set "dataset=$out/data/text" --set save_interval=10 --set train_iters=30)
"${megatron_s3[@]}" launch "${config[@]}" --slurm
job=$(squeue --noheader --format=%A | sort -n | tail -n 1)

saved() { cat "$RUN_DIR/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0; }
waited=0
until [ "$(saved)" -ge 10 ]; do
  sleep 0.2
  waited=$((waited + 1))
  if [ "$waited" -gt 1500 ]; then
    step "no checkpoint after 5 minutes"
    tail -n 40 "$RUN_DIR"/slurm-*.out
    exit 1
  fi
done
step "checkpoint $(saved): a rank is killed"
pkill --newest --signal KILL --full 'megatron_s3.pretrain_gpt'

while [ -n "$(squeue --noheader --jobs "$job" 2>/dev/null)" ]; do sleep 0.5; done
grep -E '^\[(megatron_s3|pretrain.sbatch)\]' "$RUN_DIR"/slurm-*.out
step "the job has ended at checkpoint $(saved)"
[ "$(saved)" = 30 ]

step "checkpoint to a Hugging Face model"
"${megatron_s3[@]}" export "$RUN_DIR/checkpoints" "$out/model"

step "model to figures"
mkdir -p "$out/tasks"
"$python" - "$out/tasks" <<'END'
import json, pathlib, sys

with open(pathlib.Path(sys.argv[1], "piqa.jsonl"), "w") as file:
    for i in range(4):
        record = {"goal": f"To add {i} and 1", "sol1": f"take {i + 1}", "sol2": "boil an egg"}
        file.write(json.dumps(record | {"label": 0}) + "\n")
END
"${megatron_s3[@]}" eval "S3=$out/model" --tasks piqa --data "$out/tasks" --output "$out/figure-6" --device cpu
step "done"
