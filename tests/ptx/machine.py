"""Executes the PTX of a Triton kernel on the CPU, on the host's memory, program after program.

A register is an array with a value for each lane, and an instruction is computed on all lanes at
once.  Arithmetic is IEEE with one rounding an instruction, as the hardware's is, also to bfloat16
and float16.  What the machine does not know, such as a fused multiply-add or an approximation, it
refuses.  Every access to global memory has to lie in memory that was given, be aligned, and write
only what may be written.

Not executed: the choice of registers by ptxas, races (lanes go in lockstep, and a branch has to be
taken by all of them or none), and the payload of a NaN.
"""

import ctypes
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

__all__ = ["Fault", "Instruction", "Kernel", "Memory"]

Lanes = np.ndarray

_BITS = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
_WARP = 32


class Fault(Exception):
    """Something that no GPU should be asked for, or that the machine does not know."""


class Memory:
    """Ranges of the host's memory that a kernel may access."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int, bool]] = []

    def give(self, begin: int, size: int, *, write: bool) -> None:
        """Lets a kernel read, or read and write, ``size`` bytes from an address."""
        if size:
            self._ranges = sorted([*self._ranges, (begin, begin + size, write)])

    def check(self, addresses: Lanes, size: int, *, write: bool) -> None:
        """Raises Fault unless each address is one of ``size`` bytes that may be accessed."""
        what = f"{'write' if write else 'read'} of {size} bytes"
        if (addresses % np.uint64(size)).any():
            raise Fault(f"{what} at an address that is not a multiple of it")
        if not self._ranges:
            raise Fault(f"{what}, and nothing was given")
        begins, ends, writable = (np.array(column) for column in zip(*self._ranges, strict=True))
        at = np.searchsorted(begins, addresses.astype(np.int64), side="right") - 1
        outside = (at < 0) | (addresses.astype(np.int64) + size > ends[at])
        if write:
            outside |= ~writable[at]
        if outside.any():
            raise Fault(f"{what} outside of what was given, by {int(outside.sum())} lanes")


def _bytes(address: int, size: int) -> Lanes:
    return np.frombuffer((ctypes.c_uint8 * size).from_address(int(address)), np.uint8)


def _read(addresses: Lanes, size: int) -> Lanes:
    """Bytes at each address: (lanes, size)."""
    first = int(addresses[0])
    if (np.diff(addresses.astype(np.int64)) == size).all():
        return _bytes(first, size * len(addresses)).reshape(-1, size).copy()
    return np.stack([_bytes(address, size) for address in addresses])


def _write(addresses: Lanes, rows: Lanes) -> None:
    if (np.diff(addresses.astype(np.int64)) == rows.shape[1]).all():
        ctypes.memmove(int(addresses[0]), rows.tobytes(), rows.size)
        return
    for address, row in zip(addresses, rows, strict=True):
        ctypes.memmove(int(address), row.tobytes(), len(row))


# ---- numbers -------------------------------------------------------------------------------------


def _bf16_of(x: Lanes) -> Lanes:
    """Bits of float32 numbers rounded to bfloat16: to nearest, ties to even."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def _f16_of(x: Lanes) -> Lanes:
    return np.where(np.isnan(x), 0x7FFF, x.astype(np.float16).view(np.uint16)).astype(np.uint16)


def _number(bits: Lanes, kind: str) -> Lanes:
    """Bits as numbers of a type of PTX such as f32, bf16, s64 or b32."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return bits.view(_dtype(kind))


def _dtype(kind: str) -> np.dtype:
    letter = {"f": "f", "s": "i", "u": "u", "b": "u"}[kind[0]]
    return np.dtype(f"{letter}{int(kind[1:]) // 8}")


def _size(kind: str) -> int:
    return int(re.sub(r"\D", "", kind)) // 8


def _truncated(x: Lanes) -> Lanes:
    limits = np.iinfo(np.int32)
    whole = np.clip(np.trunc(x.astype(np.float64)), limits.min, limits.max)
    return np.where(np.isnan(x), 0, whole).astype(np.int32)


def _flushed(x: Lanes) -> Lanes:
    """Zeros of their sign in place of denormal numbers."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def _shift(function: Callable, x: Lanes, by: Lanes) -> Lanes:
    """A shift by more bits than there are gives 0, and of a negative number -1."""
    most = 8 * x.dtype.itemsize - 1
    moved = function(x, np.minimum(by, most).astype(x.dtype))
    emptied = np.zeros_like(x) if x.dtype.kind == "u" or function is np.left_shift else moved
    return np.where(by > most, emptied, moved)


_ROUNDED = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
_ROUNDED |= {"sqrt": np.sqrt}
_WHOLE = {"add": np.add, "sub": np.subtract, "mul.lo": np.multiply}
_WHOLE |= {"max": np.maximum, "min": np.minimum, "neg": np.negative}
_BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_ORDERED = {"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
_ORDERED |= {"ge": np.greater_equal}


def _compare(how: str, x: Lanes, y: Lanes) -> Lanes | None:
    """A comparison of setp: with NaN those that end in u are true, and others but ne false."""
    unordered = np.isnan(x) | np.isnan(y) if x.dtype.kind == "f" else np.zeros(len(x), bool)
    if how in ("num", "nan"):
        return unordered == (how == "nan")
    if how in _ORDERED:
        return _ORDERED[how](x, y) & ~unordered
    if how == "ne":
        return (x != y) & ~unordered
    if how == "neu":
        return (x != y) | unordered
    if how[-1] == "u" and how[:-1] in _ORDERED:
        return _ORDERED[how[:-1]](x, y) | unordered
    return None


# ---- programs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    """An instruction.

    Attributes:
        guard: a predicate that has to hold in a lane, or "".
        negated: whether it has not to hold instead.
        words: the opcode, split at its dots.
        operands: as they are written; vectors and addresses with their brackets.
        text: all of it.
    """

    guard: str
    negated: bool
    words: tuple[str, ...]
    operands: tuple[str, ...]
    text: str


def _parsed(statement: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", statement, re.DOTALL)
    if found is None:
        raise Fault(f"not an instruction: {statement}")
    negated, guard, opcode, rest = found.groups()
    operands = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^\s,{}\[\]]+", rest)
    words = tuple(opcode.replace("::", ".").split("."))
    return Instruction(guard or "", negated == "!", words, tuple(operands), statement)


class Kernel:
    """A kernel of one entry.

    Args:
        ptx: its text.

    Attributes:
        parameters: their types, such as u64 and f32.
        threads: of a program.
        executed: how often each opcode was executed.
    """

    def __init__(self, ptx: str) -> None:
        text = re.sub(r"//[^\n]*", "", ptx)
        head, body = re.search(r"\.entry[^(]*\((.*?)\)(.*)", text, re.DOTALL).groups()
        self.parameters = re.findall(r"\.param \.(\w+)", head)
        self.threads = int(re.search(r"\.reqntid (\d+)", body).group(1))
        self.executed: Counter[str] = Counter()
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        for line in body[body.index("{") + 1 :].splitlines():
            for part in line.split(";"):
                statement = re.sub(r"^\{\s*(?=\.)", "", part.strip()).strip()
                if label := re.fullmatch(r"(\$?\w+):", statement):
                    self.labels[label[1]] = len(self.instructions)
                elif statement and statement[0] not in ".{}":
                    self.instructions.append(_parsed(statement))
                elif statement.startswith(".section"):
                    return

    def run(self, program: int, arguments: Sequence[int], memory: Memory, shared: int = 0) -> None:
        """Executes one program.

        Args:
            program: its index.
            arguments: the bits of each parameter.
            memory: what it may access.
            shared: bytes of shared memory.

        Raises:
            Fault: see :class:`Fault`.
        """
        with np.errstate(all="ignore"):
            _Program(self, program, arguments, memory, shared).run()


@dataclass
class _Program:
    kernel: Kernel
    program: int
    arguments: Sequence[int]
    memory: Memory
    size: int
    registers: dict[str, Lanes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lanes = self.kernel.threads
        self.lane = np.arange(lanes)
        self.registers["%tid.x"] = self.lane.astype(np.uint32)
        self.registers["%ctaid.x"] = np.full(lanes, self.program, np.uint32)
        self.registers["%ntid.x"] = np.full(lanes, lanes, np.uint32)
        self.registers["global_smem"] = np.zeros(lanes, np.uint32)  # shared memory begins at 0
        self.shared = np.zeros(self.size, np.uint8)
        #: Copies to shared memory that have been asked for, and groups of them on their way.
        self.asked: list[tuple[Lanes, Lanes]] = []
        self.groups: list[list[tuple[Lanes, Lanes]]] = []

    def run(self) -> None:
        at = 0
        while True:
            one = self.kernel.instructions[at]
            name = one.words[0]
            self.kernel.executed[".".join(one.words)] += 1
            active = np.ones(len(self.lane), bool)
            if one.guard:
                active = self.registers[one.guard] ^ one.negated
            at += 1
            if name == "ret":
                if not active.all():
                    raise Fault(f"lanes part: {one.text}")
                return
            if name == "bra":
                if active.any() and not active.all():
                    raise Fault(f"lanes part: {one.text}")
                if active.all():
                    at = self.kernel.labels[one.operands[0]]
                continue
            step = getattr(self, f"_{name}", self._plain)
            if step(one, active) is False:
                raise Fault(f"not known: {one.text}")

    # ---- operands ----

    def bits(self, operand: str, size: int) -> Lanes:
        """An operand's bits in each lane."""
        found = self.registers.get(operand)
        if operand.startswith("{"):  # the first register is the lowest part
            names = _names(operand)
            size //= len(names)
            # A part that nothing set is one that nothing reads; whatever does finds this.
            unset = np.full(len(self.lane), 0xDEAD, _BITS[2]).astype(_BITS[size])
            parts = [
                self.bits(name, size) if name[0] != "%" or name in self.registers else unset
                for name in names
            ]
            size *= len(names)
            return np.ascontiguousarray(np.stack(parts, 1)).view(_BITS[size])[:, 0]
        if found is not None:
            return found if found.dtype.itemsize == size else found.astype(_BITS[size])
        if operand.startswith(("0f", "0d")):
            value = int(operand[2:], 16)
        elif parameter := re.fullmatch(r"\w+_param_(\d+)", operand):
            value = int(parameter[1])  # parameters are numbered, and this is their address
        else:
            value = int(operand, 0) & ((1 << 8 * size) - 1)
        return np.full(len(self.lane), value, _BITS[size])

    def value(self, operand: str, kind: str) -> Lanes:
        return _number(self.bits(operand, _size(kind)), kind)

    def put(self, register: str, values: Lanes, active: Lanes) -> None:
        if register == "_":
            return
        values = np.ascontiguousarray(values)
        if values.dtype != bool:
            values = values.view(_BITS[values.dtype.itemsize])
        if not active.all():
            before = self.registers.get(register, np.zeros(len(self.lane), values.dtype))
            values = np.where(active, values, before)
        self.registers[register] = values

    def address(self, operand: str, size: int) -> Lanes:
        base, offset = re.fullmatch(r"\[\s*([%\w.]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand).groups()
        offset = np.array(int(offset or 0), np.int64).astype(_BITS[size])
        return self.bits(base, size) + offset

    # ---- arithmetic ----

    def _plain(self, one: Instruction, active: Lanes) -> bool | None:
        """Instructions that compute one register of others."""
        *words, kind = one.words
        name = ".".join(words)
        to, *sources = one.operands
        if kind == "pred":
            if name not in _BITWISE:
                return False
            result = _BITWISE[name](*(self.registers[source] for source in sources))
        elif name.endswith(".rn") and name[:-3] in _ROUNDED and kind in ("f32", "f64"):
            result = _ROUNDED[name[:-3]](*(self.value(source, kind) for source in sources))
        elif name in ("div.rn.ftz", "sqrt.rn.ftz") and kind == "f32":  # Triton 3.3's
            given = (_flushed(self.value(source, kind)) for source in sources)
            result = _flushed(_ROUNDED[words[0]](*given))
        elif name in ("max", "min") and kind == "f32":  # a number wins against a NaN
            function = np.fmax if name == "max" else np.fmin
            result = function(*(self.value(source, kind) for source in sources))
        elif name in ("abs", "neg") and kind == "f32":
            bits = self.bits(sources[0], 4)
            result = bits & np.uint32(0x7FFFFFFF) if name == "abs" else bits ^ np.uint32(1 << 31)
        elif name in _BITWISE and kind[0] == "b":
            result = _BITWISE[name](*(self.value(source, kind) for source in sources))
        elif name in _WHOLE and kind[0] in "su":
            result = _WHOLE[name](*(self.value(source, kind) for source in sources))
        elif name in ("mul.wide", "mad.wide") and kind in ("s32", "u32"):
            wide = np.int64 if kind == "s32" else np.uint64
            x, y = (self.value(source, kind).astype(wide) for source in sources[:2])
            result = (x * y).view(np.uint64)
            if len(sources) == 3:
                result = result + self.bits(sources[2], 8)
        elif name in ("shl", "shr"):
            function = np.left_shift if name == "shl" else np.right_shift
            result = _shift(function, self.value(sources[0], kind), self.bits(sources[1], 4))
        elif name == "bfe" and kind == "u32":
            x, first, count = (self.bits(source, 4).astype(np.uint64) for source in sources)
            result = ((x >> first) & ((np.uint64(1) << count) - np.uint64(1))).astype(np.uint32)
        else:
            return False
        self.put(to, result, active)
        return None

    def _setp(self, one: Instruction, active: Lanes) -> bool | None:
        _, *how, kind = one.words
        if len(how) != 1:
            return False
        targets = one.operands[0].split("|")
        x, y = one.operands[1:]
        if kind in ("bf16x2", "f16x2"):  # the first target is for the lower halves
            kind = kind[:-2]
            pairs = [
                [_number((self.bits(o, 4) >> shift).astype(np.uint16), kind) for o in (x, y)]
                for shift in (np.uint32(0), np.uint32(16))
            ]
        else:
            pairs = [[self.value(x, kind), self.value(y, kind)]]
        if len(targets) != len(pairs):
            return False
        for target, pair in zip(targets, pairs, strict=True):
            result = _compare(how[0], *pair)
            if result is None:
                return False
            self.put(target, result, active)
        return None

    def _selp(self, one: Instruction, active: Lanes) -> None:
        to, x, y, which = one.operands
        size = _size(one.words[1])
        chosen = np.where(self.registers[which], self.bits(x, size), self.bits(y, size))
        self.put(to, chosen, active)

    def _mov(self, one: Instruction, active: Lanes) -> None:
        (kind,), (to, source) = one.words[1:], one.operands
        if kind == "pred":
            given = self.registers.get(source)
            value = np.full(len(self.lane), source not in ("0", "0x0")) if given is None else given
            self.put(to, value, active)
            return
        size = _size(kind)
        if to[0] == "{":  # the first register is the lowest part
            whole = np.ascontiguousarray(self.bits(source, size))
            names = _names(to)
            parts = whole.view(_BITS[size // len(names)]).reshape(-1, len(names))
            for i, name in enumerate(names):
                self.put(name, parts[:, i], active)
        else:
            self.put(to, self.bits(source, size), active)

    def _cvt(self, one: Instruction, active: Lanes) -> bool | None:
        *how, target, source = one.words[1:]
        to, *given = one.operands
        rounded = {"bf16": _bf16_of, "f16": _f16_of}
        if how == ["rn"] and source == "f32" and target.removesuffix("x2") in rounded:
            convert = rounded[target.removesuffix("x2")]
            halves = [convert(self.value(x, source)) for x in given]
            result = halves[-1]
            if target.endswith("x2"):  # the first is above
                result = (halves[0].astype(np.uint32) << 16) | halves[1]
        elif how == ["rzi"] and (target, source) == ("s32", "f32"):
            result = _truncated(self.value(given[0], source))
        elif how == ["rzi"] and (target, source) == ("f32", "f32"):
            result = np.trunc(self.value(given[0], source))
        elif (how == ["rn"] and target[0] == "f" and source[0] in "su") or (
            not how and (source, target[0]) in (("bf16", "f"), ("f16", "f"), ("f32", "f"))
        ):
            if _size(target) < min(4, _size(source)):
                return False
            result = self.value(given[0], source).astype(_dtype(target))
        elif not how and source[0] in "sub" and target[0] in "su" and source != "bf16":
            result = self.value(given[0], source).astype(_dtype(target))
        else:
            return False
        self.put(to, result, active)
        return None

    # ---- memory ----

    def _ld(self, one: Instruction, active: Lanes) -> bool | None:
        kind, size = one.words[-1], _size(one.words[-1])
        to, source = one.operands
        if one.words[1] == "param":
            indices = self.address(source, 8)
            if (indices >= len(self.arguments)).any():
                raise Fault(f"a parameter that is not there: {source}")
            self.put(to, np.array(self.arguments, np.uint64)[indices].astype(_BITS[size]), active)
            return None
        names = _names(to)
        if one.words[1] not in ("global", "shared") or kind[0] not in "bsuf":
            return False
        rows = np.zeros((len(self.lane), size * len(names)), np.uint8)
        if active.any():
            rows[active] = self._fetched(one.words[1], source, rows.shape[1], active)
        values = rows.view(_BITS[size])
        for i, name in enumerate(names):
            self.put(name, values[:, i], active)
        return None

    def _fetched(self, space: str, source: str, size: int, active: Lanes) -> Lanes:
        if space == "shared":
            return self.shared[self._places(source, size, active)]
        addresses = self.address(source, 8)[active]
        self.memory.check(addresses, size, write=False)
        return _read(addresses, size)

    def _st(self, one: Instruction, active: Lanes) -> bool | None:
        size = _size(one.words[-1])
        to, source = one.operands
        if one.words[1] not in ("global", "shared"):
            return False
        if not active.any():
            return None
        columns = [self.bits(name, size) for name in _names(source)]
        rows = np.ascontiguousarray(np.stack(columns, 1)).view(np.uint8)[active]
        if one.words[1] == "shared":
            self.shared[self._places(to, rows.shape[1], active)] = rows
            return None
        addresses = self.address(to, 8)[active]
        self.memory.check(addresses, rows.shape[1], write=True)
        _write(addresses, rows)
        return None

    def _places(self, operand: str, size: int, active: Lanes) -> Lanes:
        at = self.address(operand, 4)[active].astype(np.int64)
        if (at % size).any() or (at + size > len(self.shared)).any():
            raise Fault(f"{size} bytes of shared memory, of which there are {len(self.shared)}")
        return at[:, None] + np.arange(size)

    def _cp(self, one: Instruction, active: Lanes) -> bool | None:
        """An asynchronous copy arrives when its group is waited for, and not before."""
        what = one.words[2]
        if what == "commit_group":
            self.groups.append(self.asked)
            self.asked = []
        elif what == "wait_group":
            while len(self.groups) > int(one.operands[0], 0):
                for places, rows in self.groups.pop(0):
                    self.shared[places] = rows
        elif what in ("ca", "cg") and one.words[3:] == ("shared", "global"):
            to, source, size, *taken = one.operands
            size = int(size, 0)
            read = self.bits(taken[0], 4) if taken else np.full(len(self.lane), size)
            if not np.isin(read[active], (0, size)).all():
                return False
            rows = np.zeros((len(self.lane), size), np.uint8)  # what is not read is 0
            if (reading := active & (read > 0)).any():
                rows[reading] = self._fetched("global", source, size, reading)
            if active.any():
                self.asked.append((self._places(to, size, active), rows[active]))
        else:
            return False
        return None

    # ---- lanes ----

    def _bar(self, one: Instruction, active: Lanes) -> None:
        """Lanes go in lockstep."""

    def _shfl(self, one: Instruction, active: Lanes) -> bool | None:
        to, source, by, *_ = one.operands
        if one.words[1:] != ("sync", "bfly", "b32") or not active.all():
            return False
        self.put(to, self.bits(source, 4)[self.lane ^ int(by, 0)], active)
        return None

    def _redux(self, one: Instruction, active: Lanes) -> bool | None:
        if one.words[1:] != ("sync", "add", "s32") or not active.all():
            return False
        to, source, _ = one.operands
        sums = self.bits(source, 4).reshape(-1, _WARP).sum(1, dtype=np.uint32)
        self.put(to, np.repeat(sums, _WARP), active)
        return None


def _names(operand: str) -> list[str]:
    return re.findall(r"[^\s,{}]+", operand)
