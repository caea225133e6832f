"""What `python -m tests.matrix` runs inside ranks: comparisons, and changes to Megatron.

rank.py compare FOLDER-OF-ITERATION ANOTHER EARLIER OUTPUT.json
rank.py CHANGE=VALUE[,CHANGE=VALUE] PROGRAM [ARGS ...]
"""

import contextlib
import copy
import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

#: What two runs that end alike may save differently: arguments (folders), timers, code of TE's.
_NOT_COMPARED = re.compile(
    r"(^|[./])(args|_extra_state|rerun_state_machine_state|content_metadata"
    r"|num_floating_point_operations_so_far)"
)


def main() -> None:
    """Runs what the command line asks for."""
    what, *rest = sys.argv[1:]
    if what == "compare":
        *folders, output = map(Path, rest)
        output.write_text(json.dumps(compare(*folders)))
        return
    for change in what.split(","):
        name, _, value = change.partition("=")
        CHANGES[name](value)
    program, *argv = rest
    sys.argv = [program, *argv]
    if program.endswith(".py"):
        sys.path[0] = str(Path(program).parent)
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


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
        "differ": sorted(n for n in kept if not _same(one.get(n), other.get(n))),
        "still": sorted(
            n for n in one if isinstance(one[n], torch.Tensor) and _same(one[n], earlier.get(n))
        ),
        "groups": _groups(one),
    }


def _contents(folder: Path) -> dict[str, Any]:
    """Everything that a checkpoint of one iteration holds, by the names there."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    files = sorted(f for f in folder.rglob("*.pt") if "tokenizer" not in f.parts)
    found: dict[str, Any] = {
        str(file.relative_to(folder)): torch.load(file, weights_only=False) for file in files
    }
    if (folder / ".metadata").exists():
        reader = dcp.FileSystemReader(folder)
        entries = reader.read_metadata().state_dict_metadata
        saved = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            if isinstance(entry, TensorStorageMetadata)
            else None
            for name, entry in entries.items()
        }
        dcp.load(saved, storage_reader=reader, no_dist=True)
        found |= saved
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


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        one, other = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
        return torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, (bool, int, float, str, bytes, type(None))):
        return one == other or one != one
    with contextlib.suppress(Exception):
        return bool(one == other) or repr(one) == repr(other)
    return repr(one) == repr(other)


def _groups(leaves: dict[str, Any]) -> list[dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for name, value in leaves.items():
        found = re.fullmatch(r"(.*param_groups/\d+)/(\w+)", name)
        if found and isinstance(value, (bool, int, float, str)):
            groups.setdefault(found[1], {})[found[2]] = value
    return sorted(groups.values(), key=lambda group: json.dumps(group, sort_keys=True))


def _freeze(pattern: str) -> None:
    """Parameters whose ``stage RANK.NAME`` matches take no part in training."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    original = GPTModel.__init__

    def init(self, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        stage = parallel_state.get_pipeline_model_parallel_rank()
        for name, parameter in self.named_parameters():
            if re.search(pattern, f"stage{stage}.{name}"):
                parameter.requires_grad_(False)

    GPTModel.__init__ = init


def _norms(_: str) -> None:
    """Lets Megatron's torch norms work on parts of a sequence, as Transformer Engine's do."""
    from megatron.core.transformer import torch_norm

    original = torch_norm.WrappedTorchNorm.__new__

    def new(cls, config: Any, *args: Any, **kwargs: Any) -> Any:
        alone = copy.copy(config)
        alone.sequence_parallel = False
        norm = original(cls, alone, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    torch_norm.WrappedTorchNorm.__new__ = new


def _attention(_: str) -> None:
    """Lets Megatron's own attention work on parts of a sequence: gathers them, and keeps its part.

    Transformer Engine's exchanges keys and values; the parts are the same (two of 2 x ranks).
    """
    from megatron.core import parallel_state
    from megatron.core.transformer import dot_product_attention as module
    from torch.distributed.nn.functional import all_gather

    cls = module.DotProductAttention
    original_init, original_forward = cls.__init__, cls.forward

    def init(self, config: Any, *args: Any, **kwargs: Any) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        original_init(self, alone, *args, **kwargs)

    def forward(self, query, key, value, attention_mask, *args: Any, **kwargs: Any):
        group = parallel_state.get_context_parallel_group()
        size, rank = group.size(), group.rank()
        if size == 1:
            return original_forward(self, query, key, value, attention_mask, *args, **kwargs)

        def whole(part: torch.Tensor) -> torch.Tensor:
            halves = [half for p in all_gather(part.contiguous(), group) for half in p.chunk(2)]
            return torch.cat([*halves[0::2], *reversed(halves[1::2])])

        query, key, value = map(whole, (query, key, value))
        length = len(query)
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
        output = original_forward(self, query, key, value, mask, *args, **kwargs)
        parts = output.chunk(2 * size)
        return torch.cat([parts[rank], parts[2 * size - 1 - rank]])

    cls.__init__, cls.forward = init, forward


def _config(text: str) -> None:
    """FIELD:NUMBER of Megatron's OptimizerConfig, where no flag sets it."""
    from megatron.core.optimizer import OptimizerConfig

    name, _, number = text.partition(":")
    if not hasattr(OptimizerConfig, name):
        print(f"OptimizerConfig: error: unrecognized arguments: {name}", flush=True)
        sys.exit(2)
    original = OptimizerConfig.__post_init__

    def post_init(self) -> None:
        setattr(self, name, float(number))
        original(self)

    OptimizerConfig.__post_init__ = post_init


CHANGES = {"freeze": _freeze, "norms": _norms, "attention": _attention, "config": _config}

if __name__ == "__main__":
    main()
