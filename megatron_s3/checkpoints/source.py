"""The input of a conversion: its index, its archives and the objects to change."""

import io
from pathlib import Path
from typing import Any

import torch

from megatron_s3.checkpoints import direction, transfer
from megatron_s3.checkpoints.errors import ConvertError
from megatron_s3.checkpoints.transfer import Settings
from megatron_s3.mcore.checkpoint import read
from megatron_s3.storage.archive import Archive
from megatron_s3.storage.index import read as read_index

__all__ = ["COMMON", "Source"]

#: Arguments and param groups in checkpoints of older releases.
COMMON = "common.pt"


class Source:
    """A checkpoint to convert.

    Attributes:
        folder: the folder of its iteration.
        index: the content of its ``.metadata``.
        archives: the indices of the archives in each file, in the order of their places.
        states: the names of the optimizer's states.
        parsed: the objects that a conversion may change, by their index (None: ``common.pt``).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_index(folder)
        self.archives: dict[str, list[Any]] = {}
        for index, place in self.index.storage_data.items():
            if getattr(place, "transform_descriptors", None):
                raise ConvertError(
                    f"{folder / place.relative_path} is compressed "
                    f"({', '.join(place.transform_descriptors)}); convert an uncompressed "
                    "checkpoint, as Megatron writes it"
                )
            self.archives.setdefault(place.relative_path, []).append(index)
        for found in self.archives.values():
            found.sort(key=lambda index: self.index.storage_data[index].offset)
        self.parsed: dict[Any, Any] = {}
        for index in self.index.storage_data:
            if not self.is_tensor(index) and _may_hold_settings(index.fqn):
                archive = self.archive(index)
                self.parsed[index] = self._load(archive.read(), archive.path)
        if (folder / COMMON).is_file():
            self.parsed[None] = self._load((folder / COMMON).read_bytes(), folder / COMMON)
        self._check_states()

    @staticmethod
    def _load(content: bytes, path: Path) -> Any:
        try:
            return read.load_object(io.BytesIO(content))
        except ValueError as error:
            raise ConvertError(f"{path} cannot be read: {error}") from error

    def place(self, index: Any) -> Any:
        """Returns the place of an archive in its file."""
        return self.index.storage_data[index]

    def is_tensor(self, index: Any) -> bool:
        """Returns whether an archive holds a shard of a tensor, and not an object."""
        return hasattr(self.index.state_dict_metadata[index.fqn], "chunks")

    def archive(self, index: Any) -> Archive:
        """Returns an archive by its index."""
        place = self.place(index)
        return Archive(self.folder / place.relative_path, place.offset, place.length)

    def _check_states(self) -> None:
        shapes: dict[str, dict[str, Any]] = {}
        for name, entry in self.index.state_dict_metadata.items():
            state = transfer.state_of(name)
            if state is None or not hasattr(entry, "chunks"):
                continue
            dtype = entry.properties.dtype
            if dtype not in (torch.float32, torch.bfloat16):
                raise ConvertError(
                    f"{self.folder}: {name} is {dtype}, and float32 or bfloat16 is expected: "
                    + (
                        "Transformer Engine stores the remainders of bfloat16 parameters there "
                        "(store_param_remainders), which are not supported. Save it from a run "
                        "without --use-precision-aware-optimizer."
                        if "param" in state
                        else "states of other dtypes are not supported. Save it from a run with "
                        "--exp-avg-dtype and --exp-avg-sq-dtype fp32 or bf16."
                    )
                )
            if "param" not in state:
                shapes.setdefault(name.replace(state, "*"), {})[state] = entry.size
        pairs = {frozenset(states) for states in shapes.values()}
        if len(pairs) > 1:
            raise ConvertError(
                f"{self.folder}: some parameters lack a state; choose another iteration with "
                "--iteration"
            )
        self.states: set[str] = set(*pairs)

    def settings(
        self, to: str, lr_factor: float | None, hyperparameters: dict[str, Any] | None
    ) -> Settings:
        """Returns the settings of the conversion; see :func:`direction.settings`.

        Raises:
            ConvertError: the checkpoint cannot be converted with them.
        """
        try:
            # Unsharded, the names of main parameters are others.
            sharded = any(transfer.state_of(n) == "param" for n in self.index.state_dict_metadata)
            found = direction.settings(
                [*self.parsed.values()], to, lr_factor, hyperparameters, sharded
            )
        except ValueError as error:
            raise ConvertError(f"{self.folder}: {error}") from error
        if self.states != set(found.states):
            raise ConvertError(
                f"{self.folder}: its states are {', '.join(sorted(self.states)) or 'missing'}, "
                f"and {' and '.join(found.states)} are expected in a checkpoint of the format "
                "torch_dist"
            )
        return found


def _may_hold_settings(name: str) -> bool:
    return "optimizer" in name or "opt_param_scheduler" in name or name.startswith("common_state")
