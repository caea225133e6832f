#!/usr/bin/env python3
"""Megatron-LM's own tests of optimizers and their checkpoints, with S3 in Adam's place.

    python -m tests.upstream TREE [--only PATTERN] [--ranks 8] [--output DIR]

TREE is a checkout of Megatron-LM, which is neither edited nor written to: what the tests build as
``OptimizerConfig(optimizer="adam")`` becomes S3 where it is built (``ranks.py``).  Every
test runs on ranks of its own, on the CPU with gloo where there is no GPU.  What fails is run again
with Adam itself, so that what this machine cannot do is told from what S3 cannot.

Results are written test by test to DIR/NAME.jsonl: the same command goes on where it was stopped.
At the end DIR/upstream_tests.txt, printed too, and .json tell for each test how it ended and which
optimizer it had really built.  Exit status 1: a test fails with S3, passes with Adam, and
``EXPLAINED`` does not say why.

Needs pytest-mock and mock; emerging-optimizers and nvidia-resiliency-ext (>= 0.6) for their tests.
"""

import argparse
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

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

#: Why a test cannot pass with another optimizer, or here: pattern of its id, reason.
EXPLAINED: tuple[tuple[str, str], ...] = (
    (
        r"::test_optimizer_common_state_dict\[tp_pp_ep\d-\w+-\w+-True-",
        "it sets `step` in some groups of rank 0 only, as FusedAdam may have none in the others; "
        "S3 counts in every group, empty ones too, so that groups are never apart",
    ),
    (
        r"::test_start_param_sync_dp_size_1$",
        "it takes the process group that an earlier test of the same process has left",
    ),
)

#: What a test needs that fails with Adam too: pattern of its id, error and place, name.
NEEDS = (
    # Without it Megatron reads torch AdamW's `step` of every state, and has mocks of its modules.
    (
        r"transformer.?engine|\bTE\b|FusedAdam|\bTE[A-Z]|k_channels|::test_fused_adam|"
        r"KeyError: 'step'|StopIteration:",
        "Transformer Engine",
    ),
    # A tensor moved to a device is another one there, and says is_cuda.
    (
        r"cuda|CUDA|[Nn][Cc][Cc][Ll]|[Tt]riton|GPU|cpu_offloading/|::test_chained_optimizer ",
        "a GPU",
    ),
    (r"MambaSSM", "mamba-ssm"),
    (r"nvidia_resiliency_ext", "nvidia-resiliency-ext 0.6"),
    (r"emerging_optimizers", "emerging-optimizers"),
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
    text = table(tests, about)
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
    path = [str(tree), str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "UPSTREAM_TESTS": json.dumps(settings),
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONPYCACHEPREFIX": str(output / "pycache"),  # not in the tree
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", *map(str, files), "-p", "ranks", "-s", "-q"]
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


def judge(
    results: dict[str, dict[str, Any]], adams: dict[str, dict[str, Any]], optimizer: str
) -> list[dict[str, Any]]:
    """Adds ``verdict``, ``needs``, ``reason`` and ``adam`` to each result.

    Verdicts: ``passed`` with the optimizer built; ``passed without`` it; ``skipped``;
    ``explained``: failed for a reason in the test; ``fails with adam`` too; ``failed without``
    having built the optimizer, and not run with Adam; ``failed``.
    """
    tests = []
    for name, result in results.items():
        adam = adams.get(name)
        reason = next((why for pattern, why in EXPLAINED if re.search(pattern, name)), "")
        built = any(map(re.compile(rf"\.{optimizer}w?\)?$", re.I).search, result["optimizers"]))
        if result["outcome"] == "passed":
            verdict, reason = "passed" if built else "passed without", ""
        elif result["outcome"] == "skipped":
            verdict, reason = "skipped", ""
        elif adam and adam["outcome"] == "failed":
            verdict = "fails with adam"
        elif adam is None and not built:
            verdict = "failed without"
        else:
            verdict = "explained" if reason else "failed"
        needs = ""
        if verdict in ("skipped", "fails with adam", "failed without"):
            said = (
                f"{name} {result['error']} {result['at']} {'' if adam is None else adam['error']}"
            )
            needs = next((need for pattern, need in NEEDS if re.search(pattern, said)), "")
        tests.append(
            result
            | {"verdict": verdict, "needs": needs, "reason": reason}
            | ({"adam": {k: adam[k] for k in ("outcome", "error", "at")}} if adam else {})
        )
    return tests


HEADINGS = {
    "failed": "failed with {0}, not known to fail with Adam, nor why",
    "passed": "passed, {0} built",
    "explained": "failed for a reason in the test itself",
    "passed without": "passed, no {0} built",
    "fails with adam": "failed on this machine with Adam too",
    "failed without": "failed before {0} was built, not run with Adam",
    "skipped": "skipped",
}


def table(tests: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The report: a block a verdict, cases of a test that ended alike in one line."""
    name = about["optimizer"].upper()
    lines = [f"{about['tree']}, {name} in Adam's place, {about['ranks']} ranks", ""]
    for verdict, heading in HEADINGS.items():
        count = sum(test["verdict"] == verdict for test in tests)
        lines.append(f"{count:5}  {heading.format(name)}")
    for verdict, heading in HEADINGS.items():
        chosen = [test for test in tests if test["verdict"] == verdict]
        if chosen:
            lines += ["", f"== {heading.format(name)}: {len(chosen)}"]
        for file, group in itertools.groupby(chosen, lambda test: test["test"].partition("::")[0]):
            lines += ["", file.removeprefix("tests/unit_tests/")]
            for said, count in _alike(list(group), verdict).items():
                lines.append(f"  {said}" + (f"   x {count}" if count > 1 else ""))
    return "\n".join(lines) + "\n"


def _alike(tests: list[dict[str, Any]], verdict: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for test in tests:
        said = test["test"].partition("::")[2].partition("[")[0] or "(the file)"
        details = []
        if verdict == "passed without" and not test["optimizers"]:
            counts["no optimizer"] = counts.get("no optimizer", 0) + 1
            continue
        if verdict.startswith("passed"):
            details.append(", ".join(test["optimizers"]) or "no optimizer")
            if test["steps"]:
                details.append("steps: " + ", ".join(f"{k} {v}" for k, v in test["steps"].items()))
        else:
            details.append(f"{test['error'][:160]}" + (f" ({test['at']})" if test["at"] else ""))
            if "adam" in test and test["adam"]["outcome"] == "failed":
                same = test["adam"]["error"] == test["error"]
                details.append("Adam: " + ("the same" if same else test["adam"]["error"][:160]))
        details += [f"needs {test['needs']}"] if test["needs"] else []
        details += [test["reason"]] if test["reason"] else []
        said = "\n      ".join([said, *details])
        counts[said] = counts.get(said, 0) + 1
    return counts


if __name__ == "__main__":
    sys.exit(main())
