"""Launch scripts of many kinds: what the translated script starts when a shell runs it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_s3.launch import args as module
from megatron_s3.launch.args import LaunchError, translate

STUBS = ("torchrun", "python", "python3", "uv", "ssh", "debugpy-run", "mpirun")
RECORD = 'printf "%s" "${0##*/}" >> "$LOG"; printf " %s" "$@" >> "$LOG"; echo >> "$LOG"\n'

# The old script; what the new one starts, a line each.
CASES = {
    "an assignment names the program": (
        'SCRIPT="pretrain_gpt.py"\n'
        'torchrun "$SCRIPT" --optimizer adam --lr 3e-4 --weight-decay 0.1',
        ["torchrun -m megatron_s3 pretrain_gpt.py --optimizer s3 --lr 3e-3 --weight-decay 0.01"],
    ),
    "two launches, one in a variable": (
        'run="python -u train.py --lr 3e-4"\n'
        'if [ -n "$DEBUG" ]; then torchrun train.py --lr 3e-4; else srun $run; fi',
        ["python -u -m megatron_s3 train.py --lr 3e-3 --optimizer s3 --weight-decay 0.001"],
    ),
    "a module, behind another program": (
        "python tools/convert_model.py --in a --out b\ntorchrun -m trainer.main --lr 3e-4",
        [
            "python tools/convert_model.py --in a --out b",
            "torchrun -m megatron_s3 -m trainer.main --lr 3e-3 --optimizer s3 --weight-decay 0.001",
        ],
    ),
    "arrays": (
        "LR=(--lr 1e-4 --min-lr 1e-5)\nADAM=(--adam-beta1 0.9\n  --adam-beta2 0.95)\n"
        'OPTS=("${LR[@]}" --weight-decay 0.1)\nOPTS+=("${ADAM[@]}")\n'
        'torchrun --nproc-per-node 8 pretrain_gpt.py "${OPTS[@]}" --clip-grad 1.0',
        [
            "torchrun --nproc-per-node 8 -m megatron_s3 pretrain_gpt.py --lr 1e-3 --optimizer s3 "
            "--min-lr 1e-4 --weight-decay 0.01 --clip-grad 0"
        ],
    ),
    "elements of two words": (
        'A=("--lr 1e-4" "--weight-decay 0.1" "--adam-eps 1e-8")\ntorchrun t.py ${A[@]} --x',
        ["torchrun -m megatron_s3 t.py --lr 1e-3 --optimizer s3 --weight-decay 0.01 --x"],
    ),
    "values in variables": (
        "LR=3e-4\nWD=0.1\nB2=0.95\nCLIP=1.0\nOPT=adam\n"
        "torchrun t.py --lr $LR --min-lr 3e-5 --weight-decay ${WD} --adam-beta2 $B2 "
        '--clip-grad "$CLIP" --optimizer $OPT --save runs/lr$LR',
        [
            "torchrun -m megatron_s3 t.py --lr 3e-3 --min-lr 3e-4 --weight-decay 0.01 "
            "--clip-grad 0 --optimizer s3 --save runs/lr3e-3"
        ],
    ),
    "one number, two meanings": (
        "X=0.1\ntorchrun t.py --lr $X --weight-decay $X",
        ["torchrun -m megatron_s3 t.py --lr 1 --optimizer s3 --weight-decay 0.01"],
    ),
    "one number, another flag's too": (
        "X=0.1\ntorchrun t.py --lr $X --weight-decay 0.1 --dropout $X",
        ["torchrun -m megatron_s3 t.py --lr 1 --optimizer s3 --weight-decay 0.01 --dropout 0.1"],
    ),
    "a quoted block for a shell": (
        "srun -l bash -c '\n  cd /\n  torchrun t.py \\\n    --lr 1e-4 \\\n    --adam-beta1 0.9 \\\n"
        "    --bf16\n'",
        ["torchrun -m megatron_s3 t.py --lr 1e-3 --optimizer s3 --weight-decay 0.001 --bf16"],
    ),
    "a command in a variable, for a shell": (
        'OPTS=" --lr 1e-4 \\\n  --weight-decay 0.1 "\nrun="cd /; python -u $PWD/t.py $OPTS"\n'
        'srun sh -c "echo ${run}; ${run}"',
        2 * ["python -u -m megatron_s3 PWD/t.py --lr 1e-3 --optimizer s3 --weight-decay 0.01"],
    ),
    "eval": (
        'CMD="torchrun t.py --lr 1e-4 --weight-decay 0.1"\neval "$CMD"',
        ["torchrun -m megatron_s3 t.py --lr 1e-3 --optimizer s3 --weight-decay 0.01"],
    ),
    "a command in a variable": (
        'CMD="torchrun t.py"\nCMD="$CMD --lr 1e-4"\nCMD+=" --weight-decay 0.1"\necho $CMD\n$CMD',
        ["torchrun -m megatron_s3 t.py --lr 1e-3 --optimizer s3 --weight-decay 0.01"],
    ),
    "a here-document": (
        "OUT=/x\nsbatch <<EOF\n#!/bin/bash\nsrun torchrun t.py --lr 1e-4 --save $OUT \\\n"
        "  --weight-decay 0.1 --node \\$NODE\nEOF",
        [
            "torchrun -m megatron_s3 t.py --lr 1e-3 --optimizer s3 --save /x --weight-decay 0.01 "
            "--node 7"
        ],
    ),
    "a here-document through a pipe": (
        "cat <<EOF | sbatch\n#!/bin/bash\ntorchrun t.py --lr 1e-4 \\\\\n --weight-decay 0.1\nEOF",
        ["torchrun -m megatron_s3 t.py --lr 1e-3 --optimizer s3 --weight-decay 0.01"],
    ),
    "a here-string": (
        "bash <<< 'torchrun t.py --lr 1e-4 --weight-decay 0.1'",
        ["torchrun -m megatron_s3 t.py --lr 1e-3 --optimizer s3 --weight-decay 0.01"],
    ),
    "a here-document as it stands, into a file": (
        "cat > job.sh <<'EOF'\nLR=1e-4\ntorchrun t.py --lr $LR --weight-decay 0.1\nEOF\n"
        "bash job.sh",
        ["torchrun -m megatron_s3 t.py --lr 1e-3 --optimizer s3 --weight-decay 0.01"],
    ),
    "a function with the flags inside": (
        'launch() {\n  torchrun "$1" --lr 1e-4 --weight-decay 0.1 "${@:2}"\n}\nlaunch t.py --x 1',
        ["torchrun -m megatron_s3 t.py --lr 1e-3 --optimizer s3 --weight-decay 0.01 --x 1"],
    ),
    "a function that is given the flags": (
        'function launch { torchrun --nproc-per-node 2 "$@"; }\n'
        "launch tools/prepare.py --in a\nlaunch t.py --lr 1e-4 --weight-decay 0.1",
        [
            "torchrun --nproc-per-node 2 tools/prepare.py --in a",
            "torchrun --nproc-per-node 2 -m megatron_s3 t.py --lr 1e-3 --optimizer s3 "
            "--weight-decay 0.01",
        ],
    ),
    "several launches, each with its own": (
        "torchrun a.py --lr 1e-4 --weight-decay 0.1\npython b.py --lr=2e-4 --optimizer adam\n"
        "python eval.py --load x",
        [
            "torchrun -m megatron_s3 a.py --lr 1e-3 --optimizer s3 --weight-decay 0.01",
            "python -m megatron_s3 b.py --lr=2e-3 --weight-decay 0.001 --optimizer s3",
            "python eval.py --load x",
        ],
    ),
    "several launches with shared flags": (
        'ARGS="--lr 1e-4"\ntorchrun a.py $ARGS --weight-decay 0.1\ntorchrun b.py $ARGS',
        [
            "torchrun -m megatron_s3 a.py --lr 1e-3 --optimizer s3 --weight-decay 0.001 "
            "--weight-decay 0.01",
            "torchrun -m megatron_s3 b.py --lr 1e-3 --optimizer s3 --weight-decay 0.001",
        ],
    ),
    "a flag given in one branch": (
        'ARGS="--weight-decay 0.1"\nif [ -n "$DEBUG" ]; then ARGS=""; fi\n'
        "torchrun a.py $ARGS --lr 1e-4",
        [
            "torchrun -m megatron_s3 a.py --optimizer s3 --weight-decay 0.001 --weight-decay 0.01 "
            "--lr 1e-3"
        ],
    ),
    "branches that belong together": (
        'if [ "$MODE" = convert ]; then S=tools/convert.py; A="--in a"\n'
        'else S=train.py; A="--lr 1e-4 --weight-decay 0.1"; fi\ntorchrun $S $A',
        ["torchrun -m megatron_s3 train.py --lr 1e-3 --optimizer s3 --weight-decay 0.01"],
    ),
    "a loop over rates": (
        "for LR in 1e-4 3e-4; do\n  torchrun t.py --lr $LR --weight-decay 0.1\ndone",
        [
            "torchrun -m megatron_s3 t.py --lr 1e-3 --optimizer s3 --weight-decay 0.01",
            "torchrun -m megatron_s3 t.py --lr 3e-3 --optimizer s3 --weight-decay 0.01",
        ],
    ),
    "quotes around values alone": (
        'B1=0.9\ntorchrun t.py --adam-beta1="$B1" --lr="1e-4" "--adam-beta2=0.95" '
        "--weight-decay='0.1' --adam-eps='1e-8'",
        ["torchrun -m megatron_s3 t.py --lr=1e-3 --optimizer s3 --weight-decay=0.01"],
    ),
    "a rate of many paths, through another variable": (
        'if [ -n "$1" ]; then BASE=1e-4; else BASE=3e-4; fi\n'
        + "".join(f'if [ -n "$N{n}" ]; then N{n}=1; else N{n}=2; fi\n' for n in range(4))
        + "LR=$BASE\ntorchrun t.py --lr $LR --weight-decay 0.1",
        ["torchrun -m megatron_s3 t.py --lr 3e-3 --optimizer s3 --weight-decay 0.01"],
    ),
    "options behind a dozen conditions": (
        "".join(
            f'if [ "$N{n}" ]; then O{n}="--o{n} 1e-{n}"; elif [ "$M{n}" ]; then O{n}=; fi\n'
            for n in range(12)
        )
        + "LR=1e-4\ntorchrun t.py --lr $LR --weight-decay 0.1 $O1 $O2",
        ["torchrun -m megatron_s3 t.py --lr 1e-3 --optimizer s3 --weight-decay 0.01"],
    ),
    "what cannot be read is passed over": (
        "f() { X=$(eval '( --clip-grad 1'); }\n"
        + "eval f\n" * 13
        + 'echo "--lr 1e-4"\ng() { torchrun t.py --lr 1e-4 --weight-decay 0.1; }\ng',
        ["torchrun -m megatron_s3 t.py --lr 1e-3 --optimizer s3 --weight-decay 0.01"],
    ),
    "a case of sizes": (
        'SIZE=big\ncase "$SIZE" in\n  small) LR=1e-3 ;;\n  big|huge) LR=1e-4 ;;\n'
        "  *) exit 1 ;;\nesac\ntorchrun t.py --lr $LR --weight-decay 0.1",
        ["torchrun -m megatron_s3 t.py --lr 1e-3 --optimizer s3 --weight-decay 0.01"],
    ),
    "a default": (
        'LR=${LR:-1e-4}\nARGS="${ARGS:---weight-decay 0.1}"\ntorchrun t.py --lr $LR $ARGS "$@"',
        ["torchrun -m megatron_s3 t.py --lr 1e-3 --optimizer s3 --weight-decay 0.01"],
    ),
    "in a pipe, in a substitution, behind &&": (
        "cd . && OUT=$(torchrun t.py --lr 1e-4 --weight-decay 0.1 2>&1 | tee out) || exit 1",
        ["torchrun -m megatron_s3 t.py --lr 1e-3 --optimizer s3 --weight-decay 0.01"],
    ),
    "runners of runners": (
        "uv run --no-sync python -m torch.distributed.run --nproc-per-node 2 t.py --lr 1e-4\n"
        "mpirun -np 2 python -u t.py --lr 1e-4\n"
        "debugpy-run -p :5678 -m torch.distributed.run -- --nnodes 1 t.py --lr 1e-4",
        [
            "uv run --no-sync python -m torch.distributed.run --nproc-per-node 2 -m megatron_s3 "
            "t.py --lr 1e-3 --optimizer s3 --weight-decay 0.001",
            "mpirun -np 2 python -u -m megatron_s3 t.py --lr 1e-3 --optimizer s3 "
            "--weight-decay 0.001",
            "debugpy-run -p :5678 -m torch.distributed.run -- --nnodes 1 -m megatron_s3 t.py "
            "--lr 1e-3 --optimizer s3 --weight-decay 0.001",
        ],
    ),
    "the last flag of a continued command goes": (
        "torchrun t.py --lr 1e-4 --weight-decay 0.1 \\\n  --adam-beta1 0.9\npython done.py",
        [
            "torchrun -m megatron_s3 t.py --lr 1e-3 --optimizer s3 --weight-decay 0.01",
            "python done.py",
        ],
    ),
    "comments and texts that only look like launches": (
        'echo "torchrun t.py --lr 1e-4"   # python x.py --lr 1\n'
        'usage="call with --lrate"\n# torchrun old.py --lr 7\n'
        "torchrun t.py --lr 1e-4 --weight-decay 0.1",
        ["torchrun -m megatron_s3 t.py --lr 1e-3 --optimizer s3 --weight-decay 0.01"],
    ),
    "a launcher that is set elsewhere": (
        "source ./env.sh\n$LAUNCHER t.py --lr 1e-4 --weight-decay 0.1",
        ["torchrun --nnodes 1 -m megatron_s3 t.py --lr 1e-3 --optimizer s3 --weight-decay 0.01"],
    ),
    "through ssh": (
        'for HOST in a b; do ssh $HOST "cd /x; torchrun t.py --lr 1e-4 --weight-decay 0.1"; done',
        [
            f"ssh {host} cd /x; torchrun -m megatron_s3 t.py --lr 1e-3 --optimizer s3 "
            "--weight-decay 0.01"
            for host in "ab"
        ],
    ),
    "a variable of a function": (
        "LR=3e-4\nwarm() { local LR=1e-5; python warm.py --rate $LR; }\nwarm\n"
        "torchrun t.py --lr $LR --weight-decay 0.1",
        [
            "python warm.py --rate 1e-5",
            "torchrun -m megatron_s3 t.py --lr 3e-3 --optimizer s3 --weight-decay 0.01",
        ],
    ),
    "a variable for one call of a function": (
        "LR=3e-4\nwarm() { python warm.py --rate $LR; }\nLR=1e-5 warm\n"
        "torchrun t.py --lr $LR --weight-decay 0.1",
        [
            "python warm.py --rate 1e-5",
            "torchrun -m megatron_s3 t.py --lr 3e-3 --optimizer s3 --weight-decay 0.01",
        ],
    ),
    "a loop over many rates": (
        f"for LR in {' '.join(f'{n}e-{k}' for k in (5, 6) for n in range(1, 10))}; do\n"
        "  torchrun t.py --lr $LR --weight-decay 0.1\ndone",
        [
            f"torchrun -m megatron_s3 t.py --lr {n}e-{k} --optimizer s3 --weight-decay 0.01"
            for k in (4, 5)
            for n in range(1, 10)
        ],
    ),
    "a rate that a loop changes": (
        "N=0 LR=1e-4\nwhile [ $N -lt 2 ]; do\n  torchrun t.py --lr $LR --weight-decay 0.1\n"
        "  LR=3e-4 N=$((N + 1))\ndone",
        [
            "torchrun -m megatron_s3 t.py --lr 1e-3 --optimizer s3 --weight-decay 0.01",
            "torchrun -m megatron_s3 t.py --lr 3e-3 --optimizer s3 --weight-decay 0.01",
        ],
    ),
    "a rate that a loop over unknown names changes": (
        "LR=1e-4\nfor NAME in $(echo a b); do\n  torchrun t.py --lr $LR --weight-decay 0.1\n"
        "  LR=3e-4\ndone",
        [
            "torchrun -m megatron_s3 t.py --lr 1e-3 --optimizer s3 --weight-decay 0.01",
            "torchrun -m megatron_s3 t.py --lr 3e-3 --optimizer s3 --weight-decay 0.01",
        ],
    ),
    "a default that is set": (
        ': "${LR:=1e-4}"\ntorchrun t.py --lr $LR --weight-decay ${WD:=0.1} --save lr$LR',
        ["torchrun -m megatron_s3 t.py --lr 1e-3 --optimizer s3 --weight-decay 0.01 --save lr1e-3"],
    ),
    "an alternative for an empty variable": (
        "DEBUG=\ntorchrun t.py --lr 1e-4 ${DEBUG:+--weight-decay 0.1}",
        ["torchrun -m megatron_s3 t.py --lr 1e-3 --optimizer s3 --weight-decay 0.001"],
    ),
    "quotes that are cut off": (
        'NAME=${1:-a}\nNAME="${NAME%\\"}"\nNAME="${NAME#\\"}"\n'
        "torchrun t.py --lr 1e-4 --weight-decay 0.1",
        ["torchrun -m megatron_s3 t.py --lr 1e-3 --optimizer s3 --weight-decay 0.01"],
    ),
    "an element of an array is set": (
        'A=(--lr 1e-4 --weight-decay 0.1)\nA[1]=2e-4\ntorchrun t.py "${A[@]}"',
        ["torchrun -m megatron_s3 t.py --optimizer s3 --lr 2e-3 --weight-decay 0.01"],
    ),
    "an empty array before the program": (
        'EXTRA=()\npython "${EXTRA[@]}" train --lr 1e-4 --weight-decay 0.1',
        ["python -m megatron_s3 train --lr 1e-3 --optimizer s3 --weight-decay 0.01"],
    ),
    "a command that is timed": (
        "time -p torchrun t.py --lr 1e-4 --weight-decay 0.1",
        ["torchrun -m megatron_s3 t.py --lr 1e-3 --optimizer s3 --weight-decay 0.01"],
    ),
    "backticks in backticks": (
        "OUT=`echo \\`torchrun t.py --lr 1e-4 --weight-decay 0.1\\``",
        ["torchrun -m megatron_s3 t.py --lr 1e-3 --optimizer s3 --weight-decay 0.01"],
    ),
    "a function that is given a command": (
        'run() { echo "$*"; bash -c "$*"; }\nrun torchrun t.py --lr 1e-4 --weight-decay 0.1',
        ["torchrun -m megatron_s3 t.py --lr 1e-3 --optimizer s3 --weight-decay 0.01"],
    ),
    "computed numbers": (
        "torchrun t.py --seed $[ (1 + 2) * 3 ] --lr 1e-4 --weight-decay 0.1",
        ["torchrun -m megatron_s3 t.py --seed 9 --lr 1e-3 --optimizer s3 --weight-decay 0.01"],
    ),
    "a test with brackets in quotes": (
        'if [[ "$1" != "a ]] b" ]]; then torchrun t.py --lr 1e-4 --weight-decay 0.1; fi',
        ["torchrun -m megatron_s3 t.py --lr 1e-3 --optimizer s3 --weight-decay 0.01"],
    ),
}


def started(script: str, folder: Path) -> list[str]:
    """The lines that stand-ins write when a shell runs the script."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "bin").mkdir(parents=True)
    scripts = dict.fromkeys(STUBS, "#!/bin/bash\n" + RECORD)
    scripts["srun"] = '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"\n'
    scripts["sbatch"] = "#!/bin/bash\nexec bash\n"
    for name, text in scripts.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "env.sh").write_text('LAUNCHER="torchrun --nnodes 1"\n')
    (folder / "script.sh").write_text(script)
    env = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "LOG": f"{folder}/log", "NODE": "7"}
    done = subprocess.run(
        ["bash", "script.sh"], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return (folder / "log").read_text().replace(str(folder), "PWD").splitlines()


@pytest.mark.parametrize("name", CASES)
def test_a_script_starts_the_launches_of_s3(name: str, tmp_path: Path) -> None:
    script, lines = CASES[name]
    found = translate(script + "\n")
    assert started(found.text, tmp_path / "run") == lines
    # Nothing else has changed: without S3's words the old script is there again.
    assert found.text.count("\n") <= (script + "\n").count("\n")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            "torchrun t.py --lr $LR --min-lr 3e-5 --weight-decay 0.1",
            r"--lr \$LR is not a number in this text",
        ),
        ("LR=$1\ntorchrun t.py --lr $LR", r"line 2: --lr \$1 is not a number in this text"),
        ("torchrun t.py --lr $(cat lr)", r"--lr \$\(cat lr\) is not a number in this text"),
        ("torchrun t.py --lr", "--lr has no value"),
        ("torchrun t.py --lr 1e-4 --clip-grad=", "--clip-grad has no value"),
        (
            "torchrun t.py --lr 1e-4 --optimizer $OPT",
            r"--optimizer \$OPT: the value is known only when",
        ),
        (
            r"torchrun t.py --lr 1e-4 --optimizer $'\x61dam'",
            "the value is known only when the script runs",
        ),
        (
            "torchrun t.py --lr 1e-4\ntorchrun b.py --lr 1 --optimizer s3",
            "line 2: .* uses S3 already",
        ),
        ("cd x\nbash run.sh --lr 1e-4", "line 2: bash is given --lr"),
        ("srun ./train.py --lr 1e-4", "./train.py is started by srun"),
        ("torchrun $DIST_ARGS $SCRIPT --lr 1e-4", "torchrun is given --lr"),
        (
            "f() {\n  torchrun t.py --lr 1e-4\n}\npython b.py",
            "line 2: no command in this text takes this --lr",
        ),
        (
            "A=(--lr 1e-4)\ntorchrun t.py --lr 2e-4",
            "line 1: no command in this text takes this --lr",
        ),
        (
            "A='--lr 1e-4'\nbash -c 'torchrun t.py $A'",
            "line 1: no command in this text takes this --lr",
        ),
        ("torchrun t.py --lr 1e-4\n;; ls", "line 2: unexpected ';;'"),
        ("torchrun t.py --lr 1e-4\n| ls", r"line 2: unexpected '\|'"),
        ("torchrun t.py --lr 1e-4 && && ls", "unexpected '&&'"),
        ("torchrun t.py --lr 1e-4 )", r"unexpected '\)'"),
        ("torchrun t.py --lr 1e-4; done", "unexpected 'done'"),
        ("torchrun t.py --lr 1e-4 'a", "a quote is not closed"),
        ("if true; then\ntorchrun t.py --lr 1e-4", "'the end' where 'fi' is expected"),
        ("X=<a placeholder>\ntorchrun t.py --lr 1e-4", "line 1: nothing follows '>'"),
        (
            "python -c 'import t; t.main()' --lr 1e-4",
            "python is given --lr, but this text does not show",
        ),
        (
            "python -c 'import t' t.py --lr 1e-4",
            "python is given --lr, but this text does not show",
        ),
        ("deepspeed t.py --lr 1e-4", "t.py is started by deepspeed"),
        ("while read L; do torchrun t.py --lr $L; done < rates", r"--lr \$L is not a number"),
        (
            "A=([0]=--lr [1]=1e-4)\ntorchrun t.py ${A[@]} --weight-decay 0.1",
            "line 1: no command in this text takes this --lr",
        ),
        (
            "A=(--lr 1e-4 --lr 2)\nunset 'A[3]'\ntorchrun t.py ${A[@]} --weight-decay 0.1",
            "line 1: no command in this text takes this --lr",
        ),
        ("$(cat cmd) --lr 1e-4", "is given --lr, but this text does not show"),
        (
            "ARGS=$(printf -- '--lr %s' 1e-4)\ntorchrun t.py $ARGS --weight-decay 0.1",
            "line 1: no command in this text takes this --lr",
        ),
        (
            "torchrun t.py --lr 1e-4 $(echo --weight-decay 0.1)",
            "no command in this text takes this --weight-decay; add",
        ),
        (
            'torchrun t.py $(if [ "$BIG" ]; then echo "--lr 1e-4"; fi) --weight-decay 0.1',
            "no command in this text takes this --lr",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused(script: str, said: str) -> None:
    with pytest.raises(LaunchError, match=said):
        translate(script + "\n")


#: By how a rate that two paths set differently reaches its flag.
WAYS = {
    "directly": "torchrun t.py --lr   $BASE",
    "on the next line": 'torchrun t.py "--lr" \\\n  "$BASE"',
    "by other variables": 'A=$BASE\nexport LR="${A}"\ntorchrun t.py --lr=$LR',
    "by a default": ": ${A:=$BASE}\nLR=${B:-$A}\ntorchrun t.py --lr $LR",
    "by a flag in a variable": "F=--lr\ntorchrun t.py $F $BASE",
    "by two variables at once": "F=--lr V=$BASE\ntorchrun t.py $F $V",
    "by an array": 'A=(\n  --lr # the peak\n  $BASE\n)\ntorchrun t.py "${A[@]}"',
    "by an element": "A=($BASE 1)\ntorchrun t.py --lr ${A[0]}",
    "by what is appended": 'A="--x"\nA+=" --lr $BASE"\ntorchrun t.py $A',
    "by a parameter": 'f() { local LR=$1; torchrun t.py --lr $LR; }\nf "$BASE"',
    "by all parameters": 'f() { torchrun t.py "$@"; }\nf --lr $BASE',
    "by set": "set -- $BASE\ntorchrun t.py --lr $1",
    "by a loop": 'A="$BASE 1e-5"\nfor LR in $A; do torchrun t.py --lr $LR; done',
    "by eval": "eval 'LR=$BASE'\ntorchrun t.py --lr $LR",
    "by eval of a name": 'N=LR\neval "$N=$BASE"\ntorchrun t.py --lr $LR',
    "in another shell": "export LR=$BASE\nbash -c 'torchrun t.py --lr $LR'",
    "by a here-document": "bash <<E\ntorchrun t.py --lr $BASE\nE",
}


@pytest.mark.parametrize("way", WAYS)
def test_paths_with_another_rate_are_not_taken_for_one(way: str) -> None:
    many = "".join(f'if [ "$N{n}" ]; then O{n}="--o{n} 1"; fi\n' for n in range(8))
    rates = 'if [ "$M" ]; then BASE=1e-4; else BASE=3e-4; fi\n'
    found = translate(f"{many}{rates}{many.replace('N', 'K')}{WAYS[way]}\n").text
    assert "then BASE=1e-3; else BASE=3e-3; fi" in found


@pytest.mark.parametrize("script", ["cat <<END", "X=$(cat <<END)"])
def test_a_here_document_without_its_text_is_empty(script: str) -> None:
    text = f"torchrun t.py --lr 1e-4 --weight-decay 0.1\n{script}"
    result = translate(text).text
    assert result.endswith(f" --lr 1e-3 --optimizer s3 --weight-decay 0.01\n{script}")


def test_the_command_refuses_with_a_reason_and_prints_nothing(tmp_path, capsys) -> None:
    for text, said in {
        "torchrun t.py --lr $LR --weight-decay 0.1": "--lr $LR is not a number in this text",
        "torchrun t.py --lr 1 --yaml-cfg a.yaml": "--yaml-cfg is not supported with S3",
        "lr: 1e-4\n(": "bash cannot read the text as a shell script",
    }.items():
        (tmp_path / "run.sh").write_text(text + "\n")
        assert module.main([str(tmp_path / "run.sh")]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.startswith("error: ") and said in told.err
    for factor in ("abc", "0", "nan", "-1", "inf"):
        with pytest.raises(SystemExit) as stopped:
            module.main(["--lr-factor", factor, str(tmp_path / "run.sh")])
        assert stopped.value.code == 2
        assert f"--lr-factor: '{factor}' is not a positive number" in capsys.readouterr().err
