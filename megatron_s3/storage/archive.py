"""Archives of ``torch.save`` (zip files): their contents, and verification of their checksums.

``torch.save`` stores a CRC-32 of every tensor and object, computed from memory, which torch's
loader does not verify.  :func:`verify` does.  It also compares the zip file's headers with its
directory, which describe every entry twice.  Nothing is unpickled.
"""

import dataclasses
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_s3.errors import MegatronS3Error

__all__ = ["Archive", "Differs", "Entry", "blocks", "entries", "verify"]

_BLOCK = 1 << 20

# The records of a zip file; see PKWARE's APPNOTE.
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_END64_LOCATOR = struct.Struct("<4sLQL")
_DESCRIPTOR = struct.Struct("<4sLLL")
_DESCRIPTOR64 = struct.Struct("<4sLQQ")
_LOCAL_CRC, _CENTRAL_CRC, _DESCRIPTOR_CRC = 14, 16, 4  # bytes before the checksum
_HAS_DESCRIPTOR = 8
_IN_ZIP64 = 0xFFFFFFFF

# Descriptions of damage, for messages.
_DIRECTORY = "its directory is inconsistent"
_HEADER = "a header contradicts the directory"
_TAIL = "the record at its end is inconsistent"


class Differs(MegatronS3Error):
    """Raised where an archive contradicts itself or its checksums."""


@dataclasses.dataclass(frozen=True)
class Archive:
    """The archive of a tensor or an object: a part of a file, or all of it.

    Attributes:
        path: the file.
        offset: where the archive begins in the file, in bytes.
        length: its length in bytes.
        data: how many bytes the tensor's elements take; None if that is not known.
    """

    path: Path
    offset: int
    length: int
    data: int | None = None

    def read(self) -> bytes:
        """Returns all bytes of the archive."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.length)


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of an archive's zip file.

    Attributes:
        name: its name, for example ``archive/data/0``.
        start: where its content begins in the archive, in bytes.
        size: the size of its content in bytes.
        checksum: the CRC-32 of its content, as stored.
        checksum_at: the places in the archive where the checksum is stored, as 4 bytes in
            little-endian order.
    """

    name: str
    start: int
    size: int
    checksum: int
    checksum_at: tuple[int, ...]

    @property
    def is_data(self) -> bool:
        """Returns whether the entry holds a tensor's elements."""
        return "/data/" in f"/{self.name}" and "/.data/" not in f"/{self.name}"


def verify(fd: int, archive: Archive) -> None:
    """Reads an archive and verifies every checksum.

    Args:
        fd: descriptor of the archive's open file.
        archive: the archive to verify.

    Raises:
        Differs: a checksum does not match, or the headers contradict each other.
        struct.error: a header is cut off.
        OSError: the file cannot be read.
    """
    sizes = []
    for entry in entries(fd, archive):
        found = _crc(fd, archive.offset + entry.start, entry.size)
        _same(f"the checksum of {entry.name} does not match", (found, entry.checksum))
        if entry.is_data:
            sizes.append(entry.size)
    if archive.data is not None:
        what = f"it holds {sum(sizes):,} bytes where the index has {archive.data:,}"
        _same(what, (sum(sizes), archive.data))


def _same(what: str, *pairs: tuple[Any, Any]) -> None:
    if any(one != other for one, other in pairs):
        raise Differs(what)


def _crc(fd: int, start: int, size: int) -> int:
    value = 0
    try:
        for block in blocks(fd, start, size):
            value = zlib.crc32(block, value)
    except EOFError:
        raise Differs("it is truncated") from None
    return value


def blocks(fd: int, start: int, length: int) -> Iterator[memoryview]:
    """Yields ``length`` bytes of a file in blocks; each block is overwritten by the next.

    Raises:
        EOFError: the file ends too soon.
    """
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


def entries(fd: int, archive: Archive) -> Iterator[Entry]:
    """Yields the entries of an archive.

    Every number in the headers that a reader uses is compared with its copy in the directory.

    Args:
        fd: descriptor of the archive's open file.
        archive: the archive to read.

    Raises:
        Differs, struct.error, OSError: as :func:`verify`.
    """

    def read(form: struct.Struct, at: int) -> tuple[Any, ...]:
        if at < 0 or at + form.size > archive.length:
            raise Differs("a header is out of place")
        return form.unpack(os.pread(fd, form.size, archive.offset + at))

    end = archive.length - _END.size
    count, size, offset = _directory(read, end)
    central = os.pread(fd, size, archive.offset + offset)
    at, here = 0, 0
    for _ in range(count):
        (magic, _, needed, flags, method, _, _, crc, packed, plain, *lengths, disk, i, e, local) = (
            _CENTRAL.unpack_from(central, at)
        )
        _same(_DIRECTORY, (magic, b"PK\1\2"), ((method, lengths[2], disk, i, e), (0,) * 5))
        places = [offset + at + _CENTRAL_CRC]
        at += _CENTRAL.size
        name = central[at : at + lengths[0]]
        extra = central[at + lengths[0] : at + lengths[0] + lengths[1]]
        at += lengths[0] + lengths[1]
        wide = _IN_ZIP64 in (packed, plain, local)
        packed, plain, local = _widened([plain, packed, local], extra)
        _same(_DIRECTORY, (packed, plain), (local, here))
        there = read(_LOCAL, local)
        _same(_HEADER, (there[:4], (b"PK\3\4", needed, flags, method)), (there[9], len(name)))
        known = (0, 0, 0) if flags & _HAS_DESCRIPTOR else (crc, packed, plain)
        _same(_HEADER, (there[6:9], known))
        start = local + _LOCAL.size
        _same("an entry has two names", (os.pread(fd, len(name), archive.offset + start), name))
        start += len(name) + there[10]
        here = start + plain
        places.append(here + _DESCRIPTOR_CRC if flags & _HAS_DESCRIPTOR else local + _LOCAL_CRC)
        yield Entry(name.decode(errors="replace"), start, plain, crc, tuple(places))
        if flags & _HAS_DESCRIPTOR:
            form = _DESCRIPTOR64 if wide else _DESCRIPTOR
            _same(
                "a descriptor contradicts the directory",
                (read(form, here), (b"PK\7\x08", crc, packed, plain)),
            )
            here += form.size
    _same(_DIRECTORY, (at, size), (here, offset))


def _widened(values: list[int], extra: bytes) -> tuple[int, int, int]:
    """Returns an entry's packed size, plain size and place; large ones are in its extra field."""
    wide: list[int] = []
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            wide = list(struct.unpack_from(f"<{length // 8}Q", extra, 4))
        extra = extra[4 + length :]
    if values.count(_IN_ZIP64) != len(wide):
        raise Differs(_DIRECTORY)
    plain, packed, local = (wide.pop(0) if v == _IN_ZIP64 else v for v in values)
    return packed, plain, local


def _directory(read: Callable[..., tuple[Any, ...]], end: int) -> tuple[int, int, int]:
    """Returns the number of entries, size and place of the directory at a zip file's end."""
    magic, disk, first, count, counts, size, offset, comment = read(_END, end)
    _same(_TAIL, (magic, b"PK\5\6"), ((disk, first, comment), (0, 0, 0)), (count, counts))
    if end >= _END64_LOCATOR.size + _END64.size:
        at = end - _END64_LOCATOR.size
        magic, disk, place, disks = read(_END64_LOCATOR, at)
        if magic == b"PK\6\7":
            _same(_TAIL, ((disk, disks), (0, 1)), (place + _END64.size, at))
            record = read(_END64, place)
            _same(_TAIL, (record[:2], (b"PK\6\6", _END64.size - 12)), (record[4:6], (0, 0)))
            _same(_TAIL, (record[6], record[7]), (min(record[6], 0xFFFF), count))
            _same(_TAIL, (min(record[8], _IN_ZIP64), size))
            _same(_TAIL, (min(record[9], _IN_ZIP64), offset))
            count, size, offset, end = *record[7:], place
    _same(_TAIL, (offset + size, end))
    return count, size, offset
