#!/usr/bin/env bash
# The first run: creates .venv, then trains a small GPT with S3 in Megatron-LM.
set -euo pipefail

usage() {
  cat <<'END'
Usage: ./scripts/quickstart.sh [OPTIONS]

Trains a GPT of about 1M parameters with S3 in Megatron-LM, with or without a GPU. It installs the
required packages into .venv, makes a dataset, trains on several ranks with the distributed optimizer
in bf16 (in fp32 on a CPU without AVX-512), resumes from its checkpoint in a new process, evaluates,
prints a table and draws the loss curves. A second call reuses the finished steps.

  --compare         also train AdamW on the same data
  --input PATH      text to train on: a folder or a FILE.jsonl (default: the standard library
                    of the running Python)
  --json-key KEY    the key of the text in a JSON line (default: text)
  --glob PATTERN    names of the files to read in the folder; may be repeated
                    (default: *.txt *.md *.rst *.py)
  --iters N         training iterations (default: 700)
  --nproc N         number of ranks (default: one for each GPU; 2 without a GPU)
  --out DIR         folder for all results (default: runs/quickstart)
  --fresh           train again, also runs that are finished
  -h, --help        show this text and exit

MEGATRON_S3_PYTHON names a Python that already has the packages, for instance that of a container;
then nothing is installed.
END
}

# The arguments are checked before the installation, so that a typing error shows at once.
given=("$@")
while [ $# -gt 0 ]; do
  case $1 in
    --compare | --fresh) shift ;;
    --input | --json-key | --glob | --iters | --nproc | --out)
      [ $# -gt 1 ] || { echo "error: $1 needs a value; see $0 --help" >&2; exit 2; }
      shift 2
      ;;
    --input=* | --json-key=* | --glob=* | --iters=* | --nproc=* | --out=*) shift ;;
    -h | --help) usage; exit 0 ;;
    *) echo "error: unknown argument $1; see $0 --help" >&2; exit 2 ;;
  esac
done

# The user's paths are relative to where the user is.
from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
repo=$PWD
# shellcheck source=scripts/_venv.sh
. scripts/_venv.sh
ensure_venv quickstart
cd "$from"
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m megatron_s3.quickstart ${given[@]+"${given[@]}"}
