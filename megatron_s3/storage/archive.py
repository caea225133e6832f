"""Archives of ``torch.save``, zip files: what they hold, and whether it is what was written.

``torch.save`` puts a CRC-32 beside every tensor and object, computed from memory, and torch's
loader does not look at it.  :func:`verify` does, and checks what is around the data against itself:
a zip file says everything about an entry twice.  Nothing is unpickled.
"""

import dataclasses
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_s3.errors import MegatronS3Error

__all__ = ["Archive", "Differs", "Entry", "entries", "verify"]

_BLOCK = 1 << 20

# What a zip file is made of; see PKWARE's APPNOTE.
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


class Differs(MegatronS3Error):
    """Two things in an archive that must agree do not."""


@dataclasses.dataclass(frozen=True)
class Archive:
    """An archive in a file, of a tensor or an object; or the file itself.

    Attributes:
        path: of the file.
        offset: of its first byte there.
        length: in bytes.
        data: bytes of the tensor, None if that is not known.
    """

    path: Path
    offset: int
    length: int
    data: int | None = None

    def read(self) -> bytes:
        """Returns the whole of it, of an object."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.length)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of the parts of which a tensor's or object's zip file is made.

    Attributes:
        name: ``archive/data/0``, for one.
        start: of its first byte, from the zip file's.
        size: in bytes.
        checksum: CRC-32 of them.
        checksum_at: where the zip file has that, as 4 bytes, the lowest first.
    """

    name: str
    start: int
    size: int
    checksum: int
    checksum_at: tuple[int, ...]

    @property
    def is_data(self) -> bool:
        """Returns whether it is a tensor's elements."""
        return "/data/" in f"/{self.name}" and "/.data/" not in f"/{self.name}"


def verify(fd: int, archive: Archive) -> None:
    """Reads an archive and compares every checksum.

    Args:
        fd: of its file, open.
        archive: which.

    Raises:
        Differs: it is not what was written.
        struct.error: nor is that.
        OSError: the disk does not give it.
    """
    sizes = []
    for entry in entries(fd, archive):
        found = _crc(fd, archive.offset + entry.start, entry.size)
        _same(f"the checksum of {entry.name}", (found, entry.checksum))
        if entry.is_data:
            sizes.append(entry.size)
    if archive.data is not None:
        what = f"{sum(sizes):,} bytes where the index has {archive.data:,}"
        _same(what, (sum(sizes), archive.data))


def _same(what: str, *pairs: tuple[Any, Any]) -> None:
    if any(one != other for one, other in pairs):
        raise Differs(what)


def _crc(fd: int, start: int, size: int) -> int:
    value, end = 0, start + size
    buffer = memoryview(bytearray(min(_BLOCK, size)))
    while start < end:
        count = os.preadv(fd, [buffer[: end - start]], start)
        if not count:
            raise Differs("it ends too soon")
        value, start = zlib.crc32(buffer[:count], value), start + count
    return value


def entries(fd: int, archive: Archive) -> Iterator[Entry]:
    """Yields all that an archive holds.

    Every number in its headers that a reader uses is compared with the other place where it is.

    Args:
        fd: of its file, open.
        archive: which.

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
        _same("the directory", (magic, b"PK\1\2"), ((method, lengths[2], disk, i, e), (0,) * 5))
        places = [offset + at + _CENTRAL_CRC]
        at += _CENTRAL.size
        name = central[at : at + lengths[0]]
        extra = central[at + lengths[0] : at + lengths[0] + lengths[1]]
        at += lengths[0] + lengths[1]
        wide = _IN_ZIP64 in (packed, plain, local)
        packed, plain, local = _widened([plain, packed, local], extra)
        _same("the directory", (packed, plain), (local, here))
        there = read(_LOCAL, local)
        _same("a header", (there[:4], (b"PK\3\4", needed, flags, method)), (there[9], len(name)))
        known = (0, 0, 0) if flags & _HAS_DESCRIPTOR else (crc, packed, plain)
        _same("a header", (there[6:9], known))
        start = local + _LOCAL.size
        _same("a name", (os.pread(fd, len(name), archive.offset + start), name))
        start += len(name) + there[10]
        here = start + plain
        places.append(here + _DESCRIPTOR_CRC if flags & _HAS_DESCRIPTOR else local + _LOCAL_CRC)
        yield Entry(name.decode(errors="replace"), start, plain, crc, tuple(places))
        if flags & _HAS_DESCRIPTOR:
            form = _DESCRIPTOR64 if wide else _DESCRIPTOR
            _same("a descriptor", (read(form, here), (b"PK\7\x08", crc, packed, plain)))
            here += form.size
    _same("the directory", (at, size), (here, offset))


def _widened(values: list[int], extra: bytes) -> tuple[int, int, int]:
    """Returns packed and plain size and place of an entry; large ones are in its extra field."""
    wide: list[int] = []
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            wide = list(struct.unpack_from(f"<{length // 8}Q", extra, 4))
        extra = extra[4 + length :]
    if values.count(_IN_ZIP64) != len(wide):
        raise Differs("the directory")
    plain, packed, local = (wide.pop(0) if v == _IN_ZIP64 else v for v in values)
    return packed, plain, local


def _directory(read: Callable[..., tuple[Any, ...]], end: int) -> tuple[int, int, int]:
    """Returns the number of entries, size and place of the directory at a zip file's end."""
    magic, disk, first, count, counts, size, offset, comment = read(_END, end)
    _same("the end", (magic, b"PK\5\6"), ((disk, first, comment), (0, 0, 0)), (count, counts))
    if end >= _END64_LOCATOR.size + _END64.size:
        at = end - _END64_LOCATOR.size
        magic, disk, place, disks = read(_END64_LOCATOR, at)
        if magic == b"PK\6\7":
            _same("the end", ((disk, disks), (0, 1)), (place + _END64.size, at))
            record = read(_END64, place)
            _same("the end", (record[:2], (b"PK\6\6", _END64.size - 12)), (record[4:6], (0, 0)))
            _same("the end", (record[6], record[7]), (min(record[6], 0xFFFF), count))
            _same("the end", (min(record[8], _IN_ZIP64), size))
            _same("the end", (min(record[9], _IN_ZIP64), offset))
            count, size, offset, end = *record[7:], place
    _same("the end", (offset + size, end))
    return count, size, offset
