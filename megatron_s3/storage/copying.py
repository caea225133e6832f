"""Copies archives from file to file, as they are or with other elements in them."""

import io
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_s3.storage import archive

__all__ = ["Slice", "Stopped", "Writer", "copy", "rewrite"]

_BLOCK = 1 << 20


class Slice(io.RawIOBase):
    """A part of a file as a file that can be read."""

    def __init__(self, path: Path, offset: int, length: int) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._offset, self.length, self._at = offset, length, 0
        self._archive = archive.Archive(path, offset, length)

    def entries(self) -> Iterator[archive.Entry]:
        """Yields what it holds, as an archive."""
        return archive.entries(self._file.fileno(), self._archive)

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to a place in the part."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        """Returns the place in the part."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Reads as many bytes as there are and the buffer takes, and returns how many."""
        view = memoryview(buffer).cast("B")
        view = view[: max(0, self.length - self._at)]
        count = os.preadv(self._file.fileno(), [view], self._offset + self._at) if len(view) else 0
        self._at += count
        return count

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
        super().close()


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


class Stopped(Exception):
    """The conversion has failed in another thread, or was interrupted."""


def copy(given: Slice, file: Writer, length: int) -> None:
    """Copies so many bytes from here on."""
    for block in _blocks(given, length):
        file.write(block)


def _blocks(given: Slice, length: int) -> Iterator[memoryview]:
    """Yields so many bytes from here on; each block is overwritten by the next.

    Raises:
        EOFError: there are fewer.
    """
    buffer = memoryview(bytearray(min(_BLOCK, length)))
    while length:
        block = buffer[:length]
        filled = 0
        while filled < len(block):
            count = given.readinto(block[filled:])
            if not count:
                raise EOFError(f"{length - filled} bytes are missing")
            filled += count
        yield block
        length -= len(block)


def rewrite(
    given: Slice, file: Writer, dtype: torch.dtype, change: Callable[[Tensor], Tensor]
) -> None:
    """Writes a tensor's zip file with other elements and their checksum, and all else as it is.

    Args:
        given: of :func:`torch.save`, with nothing read of it yet.
        file: where to; it has to take :meth:`Writer.seek`.
        dtype: of the elements.
        change: makes of some elements, in their order, others of the same dtype; it may overwrite
            those that it gets.
    """
    (data,) = (entry for entry in given.entries() if entry.is_data)
    begin, checksum = file.tell(), 0
    copy(given, file, data.start)
    for block in _blocks(given, data.size):
        new = change(torch.frombuffer(block, dtype=dtype)).view(torch.uint8).numpy()
        checksum = zlib.crc32(new, checksum)
        file.write(new)
    copy(given, file, given.length - data.start - data.size)
    end = file.tell()
    for place in data.checksum_at:
        file.seek(begin + place)
        file.write(struct.pack("<L", checksum))
    file.seek(end)
