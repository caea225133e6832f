"""Verifies the files of the iteration that is read, each rank its share of them."""

import time
from pathlib import Path
from typing import Any

import torch

from megatron_s3.log import say, say_once
from megatron_s3.mcore.all_ranks import raise_first
from megatron_s3.mcore.arguments import switches
from megatron_s3.mcore.checkpoint.choice import Choice, instead
from megatron_s3.storage import checksums
from megatron_s3.storage.errors import Damaged
from megatron_s3.storage.layout import has_config, is_of_format_torch, iteration_of

__all__ = ["verify"]


def verify(choice: Choice | None, load_dir: Any, args: Any, first: bool) -> None:
    """Raises ValueError on all ranks unless the iteration has been found undamaged."""
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
        _verify(choice.folder, Path(load_dir), args, own_file=legacy and not first)


def _verify(folder: Path, load_dir: Path, args: Any, own_file: bool) -> None:
    """Raises ValueError on all ranks if one finds the checkpoint damaged."""
    rank, ranks = 0, 1
    if torch.distributed.is_initialized():
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    error, count, began = None, 0, time.monotonic()
    try:
        # Megatron tells other formats from --ckpt-format's by that file.
        detected = getattr(args, "auto_detect_ckpt_format", False)
        config = has_config(getattr(args, "ckpt_format", None)) and not detected
        checksums.check(folder, rank, ranks, config=config)
        if own_file:
            _check_own_file(folder)
        # Before the process groups are there, only the arguments are read.
        left_out = switches(args)["plugin_no_verify_checkpoint"]
        if not left_out and torch.distributed.is_initialized():
            count = checksums.verify(folder, rank, ranks)
    except (Damaged, OSError) as caught:
        error = f"{caught}. {instead(load_dir, args, but=folder)}"
    raise_first(error)
    if count:
        seconds = time.monotonic() - began
        say(
            f"{folder}: checksums verified ({count / 1e6:,.1f} MB by each of {ranks} ranks in "
            f"{seconds:.1f} s); --plugin-no-verify-checkpoint skips this"
        )


def _check_own_file(folder: Path) -> None:
    """Checks the file that this rank reads in the format ``torch``: others would wait for it."""
    from megatron.training.checkpointing import get_checkpoint_name

    number = iteration_of(folder)
    name = get_checkpoint_name(str(folder.parent), number or 0, number is None)
    if not Path(name).is_file():
        raise Damaged(f"{name} is missing")
