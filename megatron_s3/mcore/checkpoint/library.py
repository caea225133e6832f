"""Wraps the loading of megatron-core, which programs without Megatron's trainer call."""

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_s3.mcore.all_ranks import raise_first
from megatron_s3.mcore.arguments.readers import switches
from megatron_s3.mcore.checkpoint.read import load_object
from megatron_s3.mcore.checkpoint.verification import verify_folder
from megatron_s3.mcore.state import running
from megatron_s3.optimizers import OPTIMIZERS
from megatron_s3.optimizers.description import FORMAT_WITH_STEPS
from megatron_s3.optimizers.stamp import Stamp, check_parts, settings
from megatron_s3.storage.archive import Archive
from megatron_s3.storage.index import read as read_index
from megatron_s3.storage.layout import CONFIG

__all__ = ["checked_already", "load"]

_ADVICE = "Nothing was loaded. Load another checkpoint, or write this one anew."

#: Whether the wrapper of the trainer's loading has made the checks already.
_checked: ContextVar[bool] = ContextVar("checked", default=False)


@contextlib.contextmanager
def checked_already() -> Iterator[None]:
    """Turns the checks of :func:`load` off inside a ``with`` block."""
    token = _checked.set(True)
    try:
        yield
    finally:
        _checked.reset(token)


def load(
    original: Callable[..., Any],
    sharded_state_dict: Any,
    checkpoint_dir: Any,
    *rest: Any,
    **kwargs: Any,
) -> Any:
    """Wraps ``dist_checkpointing.load``: checks the files, and which optimizer saved the state.

    The checks are those of :mod:`~megatron_s3.mcore.checkpoint.loading` for Megatron's trainer.
    They do not use megatron-core's manifest (``verify_integrity``): it must have been written at
    the save, and the first rank reads all files. Here each rank reads a part of the files.

    Raises:
        ValueError: the files are damaged, or the optimizer state belongs to another optimizer than
            the one that loads it.  All ranks raise it before anything is loaded.
    """
    folder = Path(checkpoint_dir)
    if _checked.get() or "://" in str(checkpoint_dir) or not (folder / CONFIG).is_file():
        return original(sharded_state_dict, checkpoint_dir, *rest, **kwargs)
    group = kwargs.get("process_group", rest[4] if len(rest) > 4 else None)
    optimizer = running().optimizer()
    left_out = optimizer is not None and switches(optimizer.config)["plugin_no_verify_checkpoint"]
    verify_folder(folder, lambda: _ADVICE, contents=not left_out, group=group)
    error = None
    try:
        if asked := dict(_groups(sharded_state_dict)):
            saved = _groups({**_common(checkpoint_dir), **_objects(folder, asked)})
            _compare(folder, asked, dict(saved))
    except ValueError as caught:
        error = str(caught)
    raise_first(error, group)
    return original(sharded_state_dict, checkpoint_dir, *rest, **kwargs)


def _common(checkpoint_dir: Any) -> Any:
    return dist_checkpointing.load_common_state_dict(str(checkpoint_dir))


def _objects(folder: Path, asked: Iterable[tuple[Any, ...]]) -> dict[str, Any]:
    """Returns the saved objects that contain the requested groups, by name in the checkpoint."""
    names = {path[0] for path in asked if path}
    found = {}
    for place, entry in read_index(folder).storage_data.items():
        if place.fqn in names and place.offset is None:
            archive = Archive(folder / entry.relative_path, entry.offset, entry.length)
            with contextlib.suppress(ValueError):  # Megatron reports what it cannot read
                found[place.fqn] = load_object(io.BytesIO(archive.read()))
    return found


def _groups(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yields the path and the contents of every list of param groups in a state dict.

    The path consists of the keys from the outermost to the innermost.  If the list belongs to a
    ShardedObject (the distributed optimizer in the format dp_reshardable), its path begins with the
    object's name in the checkpoint and 0, because the object is saved in a list of that name.
    """
    if isinstance(value, ShardedObject):
        value, path = value.data, (value.unique_key, 0)
    if isinstance(value, Mapping):
        for name, each in value.items():
            if name == "param_groups" and isinstance(each, list):
                yield path, [group for group in each if isinstance(group, Mapping)]
            else:
                yield from _groups(each, (*path, name))
    elif isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        for place, each in enumerate(value):
            yield from _groups(each, (*path, place))


def _compare(folder: Path, asked: Mapping[Any, Any], saved: Mapping[Any, Any]) -> None:
    """Raises ValueError if param groups were saved by another optimizer than the one loading."""
    for path, groups in asked.items():
        if not groups or not saved.get(path):
            continue  # Megatron reports what is missing
        check_parts(groups, saved[path], source=str(folder))
        algorithms, others = ({g.get("algorithm") for g in each} for each in (groups, saved[path]))
        if len(algorithms) != 1 or len(others) != 1 or algorithms == others == {None}:
            continue  # of several each group is checked as it is loaded; Megatron checks its own
        (now,), (then,) = algorithms, others
        cls = OPTIMIZERS.get(now or "")
        own, theirs = (
            {} if cls is None else settings(cls.description, each[0])
            for each in (groups, saved[path])
        )
        Stamp(_called(now), FORMAT_WITH_STEPS, own).check(
            Stamp(_called(then), saved[path][0].get("format", 1), theirs),
            source=str(folder),
            called=lambda name, value: value if name == "optimizer" else f"{name}={value}",
        )


def _called(algorithm: str | None) -> str:
    cls = OPTIMIZERS.get(algorithm or "")
    if cls is not None:
        return str(cls.description.label)
    return algorithm or "one of Megatron's own optimizers"
