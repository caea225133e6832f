"""Folders of checkpoints as Megatron and the plugin leave them, and what is read of them."""

import json
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

__all__ = ["RATES", "TRACKER", "damage", "flags", "read", "write"]

TRACKER = "latest_checkpointed_iteration.txt"
RATES = {"lr": 3e-3, "min_lr": 1e-4, "decoupled_lr": None, "decoupled_min_lr": None}


def flags(**other: object) -> Namespace:
    """Megatron's, as far as they say what is loaded."""
    values = {
        "ckpt_step": None,
        "ckpt_format": "torch_dist",
        "auto_detect_ckpt_format": False,
        "non_persistent_ckpt_type": None,
        "non_persistent_global_ckpt_dir": None,
        "pretrained_checkpoint": None,
        "exit_on_missing_checkpoint": False,
        "finetune": False,
        "no_load_optim": True,
    }
    return Namespace(**values | other)


def write(folder: Path, *iterations: int, tracker: str | None = None) -> Path:
    """Checkpoints of the format torch_dist, sealed as a save does."""
    from megatron_s3.storage import checksums

    for iteration in iterations:
        path = folder / f"iter_{iteration:07d}"
        dcp.save({"weight": torch.full((70,), iteration)}, checkpoint_id=path, no_dist=True)
        (path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
        checksums.seal(path)
    if tracker:
        (folder / TRACKER).write_text(tracker)
    return folder


def damage(path: Path) -> None:
    (data,) = path.glob("*.distcp")
    content = bytearray(data.read_bytes())
    at = content.rindex(torch.full((70,), int(path.name[5:])).numpy().tobytes())
    content[at] ^= 1
    data.write_bytes(content)


def read(folder: Path | None, args: Namespace, context: object = None) -> tuple:
    """Returns the iteration to read, and whether a non-persistent one may come before it."""
    from megatron_s3.mcore.checkpoint import loading

    found = []

    def original(load_dir, args, rank0=False, sharded=None, checkpointing_context=None):
        found.append((args.ckpt_step, args.non_persistent_ckpt_type))
        return {}, "", False, None

    before = dict(vars(args))
    for rank0 in (True, False):
        loading.load_base_checkpoint(original, folder, args, rank0, None, context)
    assert vars(args) == before
    assert found[0] == found[1]
    return found[0]
