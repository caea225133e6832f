"""Verifies the files of the iteration to be loaded; each rank reads a part of them."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_s3.log import say, say_once
from megatron_s3.mcore.all_ranks import raise_first
from megatron_s3.mcore.arguments.readers import switches
from megatron_s3.mcore.checkpoint.choice import Choice, instead
from megatron_s3.storage import checksums
from megatron_s3.storage.errors import Damaged
from megatron_s3.storage.layout import has_config, is_of_format_torch, iteration_of

__all__ = ["verify", "verify_folder"]


def verify(choice: Choice | None, load_dir: Any, args: Any, first: bool) -> None:
    """Raises ValueError on all ranks if the chosen iteration is damaged.

    Args:
        choice: the chosen iteration; None if nothing is to be loaded.
        load_dir: the folder of checkpoints.
        args: Megatron's arguments.
        first: whether this is the first read, for the saved arguments.
    """
    if choice is None:
        return
    if choice.folder is None:
        say_once(
            f"the local checkpoint of iteration {choice.iteration} is loaded without verification "
            "of checksums"
        )
        return
    legacy = is_of_format_torch(choice.folder)
    once = legacy or getattr(args, "ckpt_format", None) == "torch_dcp"
    if first or once:
        # Megatron uses metadata.json to detect the format, so the format is not known here.
        detected = getattr(args, "auto_detect_ckpt_format", False)
        left_out = switches(args)["plugin_no_verify_checkpoint"]
        verify_folder(
            choice.folder,
            functools.partial(instead, Path(load_dir), args, but=choice.folder),
            config=has_config(getattr(args, "ckpt_format", None)) and not detected,
            # Before the process groups exist, only the saved arguments are read.
            contents=not left_out and torch.distributed.is_initialized(),
            skipped_by="--plugin-no-verify-checkpoint",
            also=_check_own_file if legacy and not first else None,
        )


def verify_folder(
    folder: Path,
    advice: Callable[[], str],
    *,
    config: bool = True,
    contents: bool = True,
    skipped_by: str = "OptimizerConfig(plugin_no_verify_checkpoint=True)",
    also: Callable[[Path], None] | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> None:
    """Raises ValueError on all ranks if one of them finds the checkpoint damaged.

    Args:
        folder: the folder of one iteration.
        advice: returns the last sentence of the error message, which says what to do.
        config: whether the format has a ``metadata.json``.
        contents: whether to compare checksums; if False, only sizes are compared.
        skipped_by: the setting that skips the comparison of checksums, for the log.
        also: another check of the folder, which raises Damaged.
        group: the ranks that call this function; all ranks if None.
    """
    rank, ranks = 0, 1
    if torch.distributed.is_initialized():
        rank, ranks = (
            f(group) for f in (torch.distributed.get_rank, torch.distributed.get_world_size)
        )
    error, count, began = None, 0, time.monotonic()
    try:
        checksums.check(folder, rank, ranks, config=config)
        if also is not None:
            also(folder)
        if contents:
            count = checksums.verify(folder, rank, ranks)
    except (Damaged, OSError) as caught:
        error = f"{caught}. {advice()}"
    raise_first(error, group)
    if count:
        seconds = time.monotonic() - began
        say(
            f"{folder}: checksums verified ({count / 1e6:,.1f} MB by each of {ranks} ranks in "
            f"{seconds:.1f} s); {skipped_by} skips this"
        )


def _check_own_file(folder: Path) -> None:
    """Raises Damaged if this rank's file in the format ``torch`` is missing.

    Without this check the other ranks would wait for this one forever.
    """
    from megatron.training.checkpointing import get_checkpoint_name

    number = iteration_of(folder)
    name = get_checkpoint_name(str(folder.parent), number or 0, number is None)
    if not Path(name).is_file():
        raise Damaged(f"{name} is missing")
