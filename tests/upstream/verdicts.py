"""Which of Megatron-LM's tests count for or against the optimizer, and the report of them."""

import itertools
import re
from typing import Any

__all__ = ["EXPLAINED", "judge", "report"]

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


def report(tests: list[dict[str, Any]], about: dict[str, Any]) -> str:
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
