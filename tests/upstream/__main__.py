"""Megatron-LM's own tests of optimizers and their checkpoints, with S3 in Adam's place.

    python -m tests.upstream TREE [--only PATTERN] [--ranks 8] [--output DIR]

TREE is a checkout of Megatron-LM, which is neither edited nor written to: what the tests build as
``OptimizerConfig(optimizer="adam")`` becomes S3 where it is built (``stand_ins.py``).  Every
test runs on ranks of its own, on the CPU with gloo where there is no GPU.  What fails is run again
with Adam itself, so that what this machine cannot do is told from what S3 cannot.

Results are written test by test to DIR/NAME.jsonl: the same command goes on where it was stopped.
At the end DIR/upstream_tests.txt, printed too, and .json tell for each test how it ended and which
optimizer it had really built.  Exit status 1: a test fails with S3, passes with Adam, and
``EXPLAINED`` (``verdicts.py``) does not say why.

Needs pytest-mock and mock; emerging-optimizers and nvidia-resiliency-ext (>= 0.6) for their tests.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.upstream.verdicts import judge, report

TESTS = Path(__file__).resolve().parents[1]

#: Below TREE/tests/unit_tests: what builds optimizers, lays out their parameters or saves them.
FILES = (
    "dist_checkpointing/test_optimizer.py",
    "dist_checkpointing/test_global_metadata_reuse.py",
    "dist_checkpointing/test_nonpersistent.py",
    "dist_checkpointing/test_local.py",
    "dist_checkpointing/test_replication.py",
    "optimizer/test_*.py",
    "test_optimizer.py",
    "test_checkpointing.py",
    "test_frozen_ckpt_resume.py",
    "training/test_param_norm.py",
    "dist_checkpointing/models/test_gpt_hybrid_interop.py",
    "transformer/test_mup.py",
    "transformer/moe/test_upcycling.py",
    "distributed/mfsdp_v1/test_mcore_fully_sharded_data_parallel.py",
    "distributed/mfsdp_v2/test_optimizer.py",
    "distributed/mfsdp_v2/test_mcore_adapter.py",
    "transformer/test_fsdp_dtensor_checkpoint.py",
    "test_lion_optimizer.py",
    "test_optimizer_param_scheduler.py",
    "test_optimizer_cpu_offloading.py",
    "distributed/test_param_layout.py",
    "distributed/test_param_and_grad_buffer.py",
)


def main(argv: list[str] | None = None) -> int:
    """Runs, then reports; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tree", type=Path, help="a checkout of Megatron-LM")
    parser.add_argument("--only", metavar="PATTERN", help="as pytest's -k; no report is written")
    parser.add_argument("--ranks", type=int, default=8, help="processes of a test (default 8)")
    parser.add_argument(
        "--optimizer", default="s3", help="in Adam's place; adam leaves it (default s3)"
    )
    parser.add_argument("--output", type=Path, help="default runs/upstream-tests/TREE's name")
    parser.add_argument("--timeout", type=float, default=150, help="seconds a test (default 150)")
    parser.add_argument("--report", action="store_true", help="report what there is, run nothing")
    args = parser.parse_args(argv)
    tree = args.tree.resolve()
    if not (tree / "tests" / "unit_tests").is_dir():
        parser.error(f"{args.tree} has no tests/unit_tests: name a checkout of Megatron-LM")
    output = (args.output or Path("runs") / "upstream-tests" / tree.name).resolve()
    output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # pytest and its ranks end too
    if not args.report:
        run(args, tree, output, args.optimizer)
        if args.optimizer != "adam":
            failed = [
                t for t, r in read(output, args.optimizer).items() if r["outcome"] == "failed"
            ]
            if failed:
                run(args, tree, output, "adam", failed)
    if args.only and not args.report:
        return 0
    tests = judge(read(output, args.optimizer), read(output, "adam"), args.optimizer)
    if not tests:
        print(f"no results of {args.optimizer} in {output}", file=sys.stderr)
        return 2
    about = {"tree": tree.name, "optimizer": args.optimizer, "ranks": args.ranks}
    lines = ",\n".join(json.dumps(test) for test in tests)
    head = json.dumps(about)[:-1]
    (output / "upstream_tests.json").write_text(f'{head}, "tests": [\n{lines}\n]}}\n')
    text = report(tests, about)
    (output / "upstream_tests.txt").write_text(text)
    print(text)
    return int(any(test["verdict"] == "failed" for test in tests))


def run(
    args: argparse.Namespace,
    tree: Path,
    output: Path,
    optimizer: str,
    only: list[str] | None = None,
) -> None:
    """One pytest process, which forks the ranks of each test."""
    folder = tree / "tests" / "unit_tests"
    files = [file for pattern in FILES for file in sorted(folder.glob(pattern))]
    if only is not None:
        named = {test.partition("::")[0] for test in only}
        files = [file for file in files if str(file.relative_to(tree)) in named]
    settings = {
        "ranks": args.ranks,
        "optimizer": optimizer,
        "results": str(output / f"{optimizer}.jsonl"),
        "logs": str(output / "logs"),
        "timeout": args.timeout,
        "only": only,
        "tree": str(tree),
    }
    # The package `tests` is upstream's there; ours are `harness` and `upstream`.
    path = [str(tree), str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "UPSTREAM_TESTS": json.dumps(settings),
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONPYCACHEPREFIX": str(output / "pycache"),  # not in the tree
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        *map(str, files),
        "-p",
        "upstream.plugin",
        "-s",
        "-q",
    ]
    command += ["-p", "no:cacheprovider", "--rootdir", str(tree), "-o", "addopts="]
    command += ["-c", str(tree / "pyproject.toml"), "--continue-on-collection-errors"]
    command += ["-k", args.only] if args.only else []
    with tempfile.TemporaryDirectory() as elsewhere:
        subprocess.run(command, cwd=elsewhere, env=environment, check=False)


def read(output: Path, optimizer: str) -> dict[str, dict[str, Any]]:
    """Results by test; of a test's the last."""
    file = output / f"{optimizer}.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return {result["test"]: result for result in map(json.loads, lines)}


if __name__ == "__main__":
    sys.exit(main())
