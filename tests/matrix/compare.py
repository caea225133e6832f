"""Compares checkpoints: ``python -m tests.matrix.compare ONE ANOTHER EARLIER OUTPUT.json``.

ONE, ANOTHER and EARLIER are folders of iterations.  What unpickles them has Megatron imported.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.harness.tensors import contents, same

__all__ = ["compare"]

#: What two runs that end alike may save differently: arguments (folders), timers, code of TE's.
_NOT_COMPARED = re.compile(
    r"(^|[./])(args|_extra_state|rerun_state_machine_state|content_metadata"
    r"|num_floating_point_operations_so_far)"
)


def compare(one: Path, other: Path, earlier: Path) -> dict[str, Any]:
    """How many values two checkpoints hold, which differ, which are as they were earlier.

    Returns:
        ``values``, a count; names that ``differ`` between the two; ``still``, names of tensors of
        the first that are bitwise those of the earlier one; ``groups``, the first's param groups.
    """
    one, other, earlier = (dict(_leaves("", _contents(f))) for f in (one, other, earlier))
    kept = [name for name in one.keys() | other.keys() if not _NOT_COMPARED.search(name)]
    return {
        "values": len(kept),
        "differ": sorted(n for n in kept if not same(one.get(n), other.get(n))),
        "still": sorted(
            n for n in one if isinstance(one[n], torch.Tensor) and same(one[n], earlier.get(n))
        ),
        "groups": _groups(one),
    }


def _contents(folder: Path) -> dict[str, Any]:
    """Everything that a checkpoint of one iteration holds, by the names there."""
    files = sorted(f for f in folder.rglob("*.pt") if "tokenizer" not in f.parts)
    found: dict[str, Any] = {
        str(file.relative_to(folder)): torch.load(file, weights_only=False) for file in files
    }
    if (folder / ".metadata").exists():
        found |= contents(folder)
    return found


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{name}/{key}" if name else str(key), inner)
    elif isinstance(value, (list, tuple)):
        for key, inner in enumerate(value):
            yield from _leaves(f"{name}/{key}", inner)
    elif hasattr(value, "data") and hasattr(value, "unique_key"):  # a ShardedObject
        yield from _leaves(name, value.data)
    else:
        yield name, value


def _groups(leaves: dict[str, Any]) -> list[dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for name, value in leaves.items():
        found = re.fullmatch(r"(.*param_groups/\d+)/(\w+)", name)
        if found and isinstance(value, (bool, int, float, str)):
            groups.setdefault(found[1], {})[found[2]] = value
    return sorted(groups.values(), key=lambda group: json.dumps(group, sort_keys=True))


if __name__ == "__main__":
    *folders, output = map(Path, sys.argv[1:])
    output.write_text(json.dumps(compare(*folders)))
