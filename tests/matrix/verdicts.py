"""What became of a feature: the first error of a log, the verdict, its footnote."""

import json
import re
from typing import Any

from tests.harness.forks import TIMED_OUT
from tests.harness.runs import Run

__all__ = ["ABSENT", "LIMIT", "failure", "note", "other_groups", "verdict"]

#: Seconds after which a run is given up.
LIMIT = 240
#: What a log says where a release does not know a flag.
ABSENT = re.compile(r"error: (unrecognized arguments|argument (?!--optimizer:).*: invalid choice)")
_ERROR = re.compile(r"^(?:\[rank\d+\]: ?)?([\w.]*(?:Error|Exception|Moved)\b.*|.*: error: .*)$")
_FRAME = re.compile(r'^(?:\[rank\d+\]: ?)?\s+File "([^"]+)", line \d+')


def failure(run: Run) -> dict[str, Any]:
    """What the first error of a run says, and whether the plugin has refused something."""
    if run.returncode == TIMED_OUT:
        return {"error": f"not finished after {LIMIT} s", "refused": False}
    frame = ""
    lines = run.log.splitlines()
    for number, line in enumerate(lines):
        frame = found[1] if (found := _FRAME.match(line)) else frame
        if error := _ERROR.match(line):
            text = error[1]
            if text.rstrip(": ") == "AssertionError":  # a bare one: what was asserted
                said = [each for each in lines[:number] if each.strip(" ^~")]
                text = ": ".join(["AssertionError", *(each.strip() for each in said[-1:])])
            refused = "/megatron_s3/" in frame and text.startswith("ValueError")
            return {"error": text, "refused": refused}
    end = [line for line in lines if line.strip()][-1:]
    return {"error": f"exit status {run.returncode}: {''.join(end)}", "refused": False}


def verdict(s3: dict[str, Any], adam: dict[str, Any] | None) -> str:
    """The word for what S3 did, beside what Adam did where S3 did not do all."""
    if ABSENT.search(s3.get("error", "")):
        return "absent"
    if s3["wrong"]:
        return "defect"
    if s3["outcome"] == "bitwise":
        return "bitwise"
    order = ("failed", "not resumed", "not compared", "differs", "bitwise")
    better = adam is not None and order.index(adam["outcome"]) > order.index(s3["outcome"])
    if s3["outcome"] == "failed":
        return "refused" if s3["refused"] else "defect" if better else "not here"
    if better:
        return "defect"
    return "losses" if s3.get("same losses") else "trained"


def note(s3: dict[str, Any], adam: dict[str, Any] | None) -> str:
    """What a footnote says of the cell; empty where all is well."""
    if s3["wrong"]:
        return "; ".join(s3["wrong"][:3])
    if s3["outcome"] == "bitwise" or ABSENT.search(s3.get("error", "")):
        return ""
    what = _of(s3)
    if adam is None or _of(adam) == what:
        return what + ("" if adam is None else " (Adam: the same)")
    return f"{what} (Adam: {_of(adam)})"


def _of(attempt: dict[str, Any]) -> str:
    if attempt["outcome"] == "differs":
        names = ", ".join(attempt["differ"][:2])
        return f"{len(attempt['differ'])} of {attempt['values']} values differ: {names}"
    where = {"not resumed": "resuming: ", "not compared": "comparing: "}
    return where.get(attempt["outcome"], "") + attempt.get("error", attempt["outcome"])


def other_groups(s3: list[dict], adam: list[dict]) -> list[str]:
    """Param groups of S3's that have not Adam's rates, weight decay and so on."""
    if len(s3) != len(adam) or not s3:
        return [f"{len(s3)} param groups, Adam has {len(adam)}"]
    shared = set.intersection(*(set(group) for group in (*s3, *adam)))
    shared -= {"step", "beta", "p"}
    kept = [
        sorted(json.dumps({k: g[k] for k in sorted(shared)}) for g in groups)
        for groups in (s3, adam)
    ]
    return [] if kept[0] == kept[1] else [f"param groups differ from Adam's: {kept}"]
