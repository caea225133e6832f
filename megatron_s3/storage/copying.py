"""Copies archives from file to file, as they are or with other elements in them."""

import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_s3.errors import MegatronS3Error
from megatron_s3.storage.archive import Archive, entries

__all__ = ["Stopped", "Writer", "copy", "rewrite"]

_BLOCK = 1 << 20


class Writer:
    """A file to write, that knows what stopped it.

    Attributes:
        error: a full disk, or that another thread's has failed.
    """

    def __init__(self, file: BinaryIO, stop: threading.Event) -> None:
        self._file, self._stop = file, stop
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        """Writes some bytes.

        Raises:
            OSError: the disk does not take them.
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
        """Hands to the system what was written."""
        self._file.flush()

    def tell(self) -> int:
        """Returns the place in the file."""
        return self._file.tell()

    def seek(self, place: int) -> None:
        """Moves to a place in the file."""
        self._file.seek(place)


class Stopped(MegatronS3Error):
    """The conversion has failed in another thread, or was interrupted."""


def copy(archive: Archive, file: Writer) -> None:
    """Writes an archive as it is.

    Raises:
        EOFError: its file ends too soon.
    """
    with open(archive.path, "rb", buffering=0) as given:
        _copy(given.fileno(), archive.offset, archive.length, file)


def rewrite(
    archive: Archive, file: Writer, dtype: torch.dtype, change: Callable[[Tensor], Tensor]
) -> None:
    """Writes a tensor's archive with other elements and their checksum, and all else as it is.

    Args:
        archive: of a tensor.
        file: where to; it has to take :meth:`Writer.seek`.
        dtype: of the elements.
        change: makes of some elements, in their order, others of the same dtype; it may overwrite
            those that it gets.

    Raises:
        EOFError: as :func:`copy`.
    """
    with open(archive.path, "rb", buffering=0) as given:
        fd, begin, checksum = given.fileno(), file.tell(), 0
        (data,) = (entry for entry in entries(fd, archive) if entry.is_data)
        _copy(fd, archive.offset, data.start, file)
        for block in _blocks(fd, archive.offset + data.start, data.size):
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
    for block in _blocks(fd, start, length):
        file.write(block)


def _blocks(fd: int, start: int, length: int) -> Iterator[memoryview]:
    """Yields so many bytes; each block is overwritten by the next."""
    buffer, end = memoryview(bytearray(min(_BLOCK, length))), start + length
    while start < end:
        block, filled = buffer[: end - start], 0
        while filled < len(block):
            count = os.preadv(fd, [block[filled:]], start + filled)
            if not count:
                raise EOFError(f"{end - start - filled} bytes are missing")
            filled += count
        yield block
        start += filled
