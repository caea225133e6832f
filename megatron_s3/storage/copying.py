"""Copies of archives: from file to file, unchanged or with other elements."""

import struct
import threading
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_s3.errors import MegatronS3Error
from megatron_s3.storage.archive import Archive, blocks, entries

__all__ = ["Stopped", "Writer", "copy", "rewrite"]


class Writer:
    """A file to write to, which keeps the error that stopped it.

    Attributes:
        error: the error of the last write: of the disk, or :class:`Stopped`; None if it succeeded.
    """

    def __init__(self, file: BinaryIO, stop: threading.Event) -> None:
        self._file, self._stop = file, stop
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        """Writes bytes.

        Raises:
            OSError: the disk is full or fails.
            Stopped: the conversion has ended.
        """
        try:
            if self._stop.is_set():
                raise Stopped
            return self._file.write(data)
        except BaseException as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Flushes buffered bytes to the operating system."""
        self._file.flush()

    def tell(self) -> int:
        """Returns the position in the file."""
        return self._file.tell()

    def seek(self, place: int) -> None:
        """Moves to a position in the file."""
        self._file.seek(place)


class Stopped(MegatronS3Error):
    """The conversion has failed in another thread, or was interrupted."""


def copy(archive: Archive, file: Writer) -> None:
    """Copies an archive unchanged.

    Raises:
        EOFError: the archive's file is truncated.
    """
    with open(archive.path, "rb", buffering=0) as given:
        _copy(given.fileno(), archive.offset, archive.length, file)


def rewrite(
    archive: Archive, file: Writer, dtype: torch.dtype, change: Callable[[Tensor], Tensor]
) -> None:
    """Copies a tensor's archive with new elements and their checksum, and the rest unchanged.

    Args:
        archive: the archive of a tensor.
        file: the file to write to; it must support :meth:`Writer.seek`.
        dtype: the dtype of the elements.
        change: returns the new elements of a block, in the same order and dtype; it may overwrite
            its argument.

    Raises:
        EOFError: as :func:`copy`.
    """
    with open(archive.path, "rb", buffering=0) as given:
        fd, begin, checksum = given.fileno(), file.tell(), 0
        (data,) = (entry for entry in entries(fd, archive) if entry.is_data)
        _copy(fd, archive.offset, data.start, file)
        for block in blocks(fd, archive.offset + data.start, data.size):
            new = change(torch.frombuffer(block, dtype=dtype)).view(torch.uint8).numpy()
            checksum = zlib.crc32(new, checksum)
            file.write(new)
        end = data.start + data.size
        _copy(fd, archive.offset + end, archive.length - end, file)
    place = file.tell()
    for at in data.checksum_at:
        file.seek(begin + at)
        file.write(struct.pack("<L", checksum))
    file.seek(place)


def _copy(fd: int, start: int, length: int, file: Writer) -> None:
    for block in blocks(fd, start, length):
        file.write(block)
