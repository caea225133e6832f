"""The kernel against the float64 reference and, bit for bit, the portable step.

On a GPU it is the Triton kernel as compiled; in a rehearsal the same kernel interpreted, and the
C++ kernel.  Every tensor lies between two strips of known bytes, which must not change.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_s3.kernels import portable
from megatron_s3.kernels.operands import Operands
from megatron_s3.kernels.statistics import FIELDS, Statistics
from megatron_s3.rules.s3 import s3_bound, s3_update
from scripts.acceptance.rows import Writer
from scripts.acceptance.task import Task
from tests.harness.reference import S3Reference
from tests.harness.tensors import bits, bitwise, compact

__all__ = ["Case", "Placed", "check", "compare", "counted", "stepped"]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
OPTIONS: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "beta": 0.95, "p": 3.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "p=1": {"p": 1.0},
    "p=2": {"p": 2.0},
    "p=2.5": {"p": 2.5},
    "no nesterov": {"nesterov": False},
    "beta2": {"beta": 0.9, "beta2": 0.95},
    "beta=0": {"beta": 0.0},
    "correction": {"correction": 4.7, "weight_decay": 0.0},
    "bounded": {"grad_bound": 1.3},
    "bounded, p=2": {"grad_bound": 1.3, "p": 2.0},
    "bounded, beta=0": {"grad_bound": 1.3, "beta": 0.0},
    "cautious": {"cautious": True},
}
#: Those of a rehearsal; the tests have the interpreter take all.
_REHEARSED = ("beta=0", "bounded", "bounded, p=2")
#: Largest error of u, which is at most 1, against float64.
TOLERANCE = 4e-6
#: A unit in the last place, relative.
_ULP = {F32: 2.0**-23, BF16: 2.0**-7, F16: 2.0**-10}
_STRIP = 64  # elements


@dataclass(frozen=True)
class Case:
    """Dtypes of a launch."""

    grad: torch.dtype = F32
    exp_avg: torch.dtype = F32
    exp_pnorm: torch.dtype = F32
    model: torch.dtype | None = BF16

    def __str__(self) -> str:
        short = {F32: "fp32", BF16: "bf16", F16: "fp16", None: "none"}
        names = ("grad", "exp_avg", "exp_pnorm", "model")
        return ", ".join(f"{name} {short[getattr(self, name)]}" for name in names)


class Placed:
    """Operands in the middle of training, each tensor ``offset`` elements off 256 bytes.

    Attributes:
        operands: on the device.
        start: the same values on the CPU, never stepped.
    """

    def __init__(
        self, count: int, case: Case, device: str, *, offset: int = 0, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(1000 * count + seed)
        random = partial(torch.randn, count, generator=generator)
        self._strips: list[Tensor] = []
        # Gradients of magnitudes from 1e-12 to 1e4, some 0.
        scale = 10.0 ** torch.empty(count).uniform_(-12, 4, generator=generator)
        if case.grad == F16:
            scale.clamp_(1e-3, 1e3)
        grad, exp_pnorm = random() * scale, random().abs() * scale
        grad[::7], exp_pnorm[::21] = 0, 0
        # As after any steps: |exp_avg| does not exceed exp_pnorm.
        exp_avg = exp_pnorm * torch.empty(count).uniform_(-0.5, 0.5, generator=generator)
        model = None if case.model is None else torch.zeros(count, dtype=case.model)
        states = (exp_avg.to(case.exp_avg), exp_pnorm.to(case.exp_pnorm))
        self.start = Operands(random(), grad.to(case.grad), states, model)
        place = partial(self._place, device=device, offset=offset)
        self.operands = Operands(
            place(self.start.param),
            place(self.start.grad),
            tuple(place(state) for state in states),
            None if model is None else place(model),
        )

    def _place(self, values: Tensor, device: str, offset: int) -> Tensor:
        strip = _STRIP * 4 // values.element_size() * 2  # 512 bytes of any dtype
        memory = torch.full((len(values) + 2 * strip + offset,), 7.0, dtype=values.dtype)
        memory[strip + offset : strip + offset + len(values)] = values
        memory = memory.to(device)
        self._strips += [memory[: strip + offset], memory[strip + offset + len(values) :]]
        return memory[strip + offset : strip + offset + len(values)]

    def fault(self) -> str | None:
        """What was written that must not be, or None."""
        if not all(bool((strip == 7).all()) for strip in self._strips):
            return "memory before or behind a tensor was written"
        if not torch.equal(self.operands.grad.cpu(), self.start.grad):
            return "a gradient was written"
        return None


def stepped(start: Operands, device: str, **options: Any) -> Operands:
    """What the portable step makes of a copy of operands on a device, back on the CPU.

    States and model parameter as they were before they were rounded: all of it in float32.
    """
    copy = Operands(
        start.param.to(device, copy=True),
        start.grad.to(device),
        tuple(state.to(device, F32, copy=True) for state in start.state),
        None,
    )
    portable.step(s3_update, [copy], **options)
    state = tuple(tensor.cpu() for tensor in copy.state)
    param = copy.param.cpu()
    return Operands(param, start.grad, state, None if start.model_param is None else param)


def compare(placed: Placed, *, interpreted: bool, device: str, **options: Any) -> str | None:
    """What is wrong with operands that a kernel has stepped once, or None.

    Args:
        placed: what was stepped.
        interpreted: whether by Triton's interpreter, which rounds to bfloat16 towards zero.
        device: where the portable step is taken, besides the CPU.
        **options: as the kernel was given.
    """
    if found := placed.fault():
        return found
    ours, start = placed.operands, placed.start
    exact = options["p"] in (1, 2, 3)
    for where in dict.fromkeys(("cpu", device)):
        theirs = stepped(start, where, **options)
        for name, a, b in _pairs(ours, theirs):
            rounded = b.to(a.dtype)
            # A parameter is a sum, and may come to lie close to 0.
            size = b.abs() + options["lr"] if "param" in name else b.abs()
            if exact and not (interpreted and a.dtype != F32):
                if not bitwise(a, rounded):
                    wrong = int((a != rounded).sum())
                    return f"{name} is not bitwise the portable step's on {where}: {wrong} elements"
            elif not _close(a, b, 3e-6 + 1.01 * _ULP[a.dtype], size):
                return f"{name} is far from the portable step's on {where}"
    return _against_reference(ours, start, interpreted, **options)


def _against_reference(
    ours: Operands, start: Operands, interpreted: bool, **options: Any
) -> str | None:
    lr, decay, p = options["lr"], options["weight_decay"], options["p"]
    names = ("beta", "p", "beta2", "nesterov", "grad_bound", "cautious")
    given = {name: options[name] for name in names if name in options}
    reference = S3Reference(start.param, weight_decay=decay, **given)
    reference.m, reference.s = start.state[0].double(), start.state[1].double() ** p
    correction = options.get("correction", 1.0)
    bound = s3_bound(options["beta"], p, options.get("beta2"), correction)
    u = (reference.step(start.grad, lr) * correction).clamp(-bound, bound)
    x = (1 - lr * decay) * start.param.double() - lr * u
    error = (ours.param.cpu().double() - x).abs() - 2 * _ULP[F32] * start.param.double().abs()
    if not bool((error <= lr * correction * TOLERANCE).all()):
        return f"u is {float(error.max()) / lr:.1e} from the float64 reference's"
    # Relative to what was added up: a sum of opposite signs has lost digits.
    of_sum = start.state[0].double().abs() + start.grad.double().abs()
    wanted = ((reference.m, of_sum), (reference.s ** (1 / p), None))
    for name, state, (want, size) in zip(("exp_avg", "exp_pnorm"), ours.state, wanted, strict=True):
        relative = 3e-6 + _ULP[state.dtype] * (1.01 if interpreted else 0.51)
        if not _close(state.cpu(), want, relative, size):
            return f"{name} is far from the float64 reference's"
    return None


def _pairs(ours: Operands, theirs: Operands) -> Iterator[tuple[str, Tensor, Tensor]]:
    yield "param", ours.param.cpu(), theirs.param
    for name, a, b in zip(("exp_avg", "exp_pnorm"), ours.state, theirs.state, strict=True):
        yield name, a.cpu(), b
    if ours.model_param is not None:
        yield "model_param", ours.model_param.cpu(), theirs.param


def _close(a: Tensor, b: Tensor, relative: float, size: Tensor | None = None) -> bool:
    a, b = a.double(), b.double()
    size = b.abs() if size is None else size
    return bool(((a - b).abs() <= relative * size + 1e-37).all())


# ---- the section ---------------------------------------------------------------------------------


def _cases(full: bool) -> list[Case]:
    if not full:
        return [Case(), Case(BF16, BF16, BF16, BF16), Case(F16, BF16, F32, None)]
    states = ((F32, F32), (BF16, BF16), (BF16, F32), (F32, BF16))
    return [
        Case(grad, *pair, model)
        for grad in (F32, BF16, F16)
        for pair in states
        for model in (None, BF16, F16)
    ]


def _list(case: Case, device: str, chunk: int, full: bool) -> list[Placed]:
    """All sizes and alignments in one launch."""
    sizes = [1, 127, 128, 129, 1025, chunk - 1, chunk, chunk + 1]
    offsets: Sequence[int] = (0, 1, 2, 3, 4, 8)
    if full:
        sizes += [3 * chunk + 17, 64 * chunk]
    else:
        sizes, offsets = [1, 129, chunk + 1], (0, 1)
    return [
        Placed(size, case, device, offset=offset, seed=offset)
        for size in sizes
        for offset in (offsets if size < 4 * chunk else (0, 1))
    ]


def check(writer: Writer, task: Task) -> None:
    """Rows by dtypes and variants; on a GPU also tensors of over 2**31 elements, streams, GPUs."""
    from megatron_s3.kernels import cpu, gpu

    on_gpu = task.device == "cuda"
    kernels: list[tuple[str, ModuleType]] = [("Triton", gpu)]
    if not on_gpu:
        kernels = [("Triton interpreted", gpu), ("C++", cpu)]
    for name, kernel in kernels:
        _check_kernel(writer, name, kernel, task)
        if task.part == 0 and kernel.reason(s3_update, [], beta=0.95, p=3.0) is None:
            _check_small(writer, name, kernel, task.device)
    if on_gpu:
        # The first of the parts begin these last, and the last has what takes longest.
        if task.part == task.parts - 1:
            _large(writer)
        if task.part == 0:
            _other_stream(writer)
            _other_gpu(writer)
    else:
        for what in ("over 2**31 elements", "another stream", "another GPU"):
            writer.skipped(what, "not run: it needs a GPU")


def _check_kernel(writer: Writer, name: str, kernel: ModuleType, task: Task) -> None:
    device = task.device
    on_gpu = device == "cuda"
    interpreted = name.endswith("interpreted")
    chunk = 16384
    if name.startswith("Triton"):
        from megatron_s3.kernels.gpu.kernel import CHUNK as chunk
    probe = Placed(8, Case(), device).operands
    # The interpreter is told about devices that its kernel does not take.
    if not interpreted and (why := kernel.reason(s3_update, [probe], beta=0.95, p=3.0)):
        if on_gpu:
            writer.failed(name, why)
        else:
            writer.skipped(name, why)
        return
    cases = [(str(case), case, {}) for case in _cases(on_gpu)]
    cases += [
        (variant, Case(), changes)
        for variant, changes in VARIANTS.items()
        if on_gpu or variant in _REHEARSED
    ]
    for label, case, changes in cases[task.part :: task.parts]:
        options = OPTIONS | changes
        exact = options["p"] in (1, 2, 3)
        if kernel.__name__.endswith(".cpu") and not exact:
            continue
        placed = _list(case, device, chunk, on_gpu)
        kernel.step(s3_update, [one.operands for one in placed], **options)
        faults = {
            found
            for one in placed
            if (found := compare(one, interpreted=interpreted, device=device, **options))
        }
        if exact and (found := counted(kernel, _list(case, device, chunk, False), **options)):
            faults.add(found)
        check = f"{name}: {label}"
        if faults:
            writer.failed(check, "; ".join(sorted(faults)))
        else:
            with_bits = "bitwise portable, statistics, " if exact else ""
            writer.passed(check, f"{len(placed)} tensors: {with_bits}float64 within {TOLERANCE:g}")


def _check_small(writer: Writer, name: str, kernel: ModuleType, device: str) -> None:
    """Rows for fractions in int8 and remainders in int16, of all magnitudes, NaN and inf."""
    interpreted = name.endswith("interpreted")
    for remainders in (False, True):
        wrong = set()
        # The interpreter's bfloat16 has no denormal numbers, and is rounded towards zero.
        grad = F32 if interpreted else BF16
        for norm in (F32,) if interpreted else (F32, BF16):
            for count in (129, 16384 + 77):
                start = compact(count, grad=grad, norm=norm, remainders=remainders)
                tensors = [start.param, start.grad, *start.state]
                tensors += [] if start.model_param is None else [start.model_param]
                x, g, m, r, *model = (tensor.to(device, copy=True) for tensor in tensors)
                ours = Operands(x, g, (m, r), *model)
                for seed in (1, (1 << 24) - 1):
                    kernel.step(s3_update, [ours], seed=seed, **OPTIONS)
                    portable.step(s3_update, [start], seed=seed, **OPTIONS)
                for a, b in _written(ours, start):
                    if not torch.equal(bits(a.cpu()), bits(b)):
                        wrong.add(f"{a.dtype} with exp_pnorm in {norm}")
        check = f"{name}: int8 state" + (", remainders" if remainders else "")
        if wrong:
            writer.failed(check, f"not bitwise the portable step's: {', '.join(sorted(wrong))}")
        else:
            writer.passed(check, "two steps, bitwise portable")


#: Largest relative error of a sum in float32.
_OF_SUMS = 1e-5


def counted(kernel: ModuleType, placed: Sequence[Placed], **options: Any) -> str | None:
    """Returns what is wrong with a step that counts statistics, or None.

    It has to write the bits of the step that does not.  The counts and the maximum are exact.

    Args:
        kernel: steps.
        placed: operands that were not stepped.
        **options: of the step, with a p for which the kernel is exact.
    """
    device = placed[0].operands.param.device
    ours, theirs = Statistics(device), Statistics("cpu")
    silent = [_copied(one.operands) for one in placed]
    kernel.step(s3_update, silent, **options)
    kernel.step(s3_update, [one.operands for one in placed], statistics=ours, **options)
    for one, without in zip(placed, silent, strict=True):
        if found := one.fault():
            return f"with statistics {found}"
        if not all(bitwise(a, b) for a, b in _written(one.operands, without)):
            return "with statistics the step has other bits"
        start = one.start
        state = tuple(tensor.float() for tensor in start.state)
        copy = Operands(start.param.clone(), start.grad, tuple(map(Tensor.clone, state)))
        portable.step(s3_update, [copy], statistics=theirs, **options)
    (found,), (wanted,) = ours.take(), theirs.take()
    for name in FIELDS:
        sums = name.startswith("sum")
        if abs(found[name] - wanted[name]) > (_OF_SUMS * abs(wanted[name]) if sums else 0):
            return f"{name} is {found[name]}, and {wanted[name]} by the portable step"
    return None


def _copied(o: Operands) -> Operands:
    model = None if o.model_param is None else o.model_param.clone()
    return Operands(o.param.clone(), o.grad, tuple(map(Tensor.clone, o.state)), model)


def _written(one: Operands, other: Operands) -> Iterator[tuple[Tensor, Tensor]]:
    yield one.param, other.param
    yield from zip(one.state, other.state, strict=True)
    if one.model_param is not None and other.model_param is not None:
        yield one.model_param, other.model_param


def _large(writer: Writer) -> None:
    """Offsets that 32 bits do not hold: a tensor's both ends, and the places around 2**31."""
    from megatron_s3.kernels import gpu

    what = "over 2**31 elements"
    count = 2**31 + 100_003
    need = count * 12 + 2**31
    if (free := torch.cuda.mem_get_info()[0]) < need:
        writer.skipped(what, f"needs {need / 2**30:.0f} GiB, and {free / 2**30:.0f} are free")
        return
    generator = torch.Generator("cuda").manual_seed(1)

    def made(dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype, device="cuda").normal_(0, 1e-3, generator=generator)

    norm = made(BF16).abs_()
    given = Operands(made(F32), made(BF16), (made(BF16), norm), made(BF16))
    places = [slice(b, b + 70_000) for b in (0, 2**30 - 30_000, 2**31 - 30_000, count - 70_000)]
    starts = [
        Operands(
            given.param[part].cpu(),
            given.grad[part].cpu(),
            tuple(state[part].cpu() for state in given.state),
            given.model_param[part].cpu(),
        )
        for part in places
    ]
    gpu.step(s3_update, [given], **OPTIONS)
    torch.cuda.synchronize()
    for part, start in zip(places, starts, strict=True):
        theirs = stepped(start, "cpu", **OPTIONS)
        ours = Operands(
            given.param[part],
            given.grad[part],
            tuple(state[part] for state in given.state),
            given.model_param[part],
        )
        for name, a, b in _pairs(ours, theirs):
            if not bitwise(a, b.to(a.dtype)):
                writer.failed(what, f"{name} differs from the portable step's in {part}")
                return
    writer.passed(
        what, f"{count:,} elements, bitwise portable at both ends and around 2**30, 2**31"
    )


def _other_stream(writer: Writer) -> None:
    """Steps on a stream of their own, on gradients that the same stream has just made."""
    from megatron_s3.kernels import gpu

    one = Placed(500_000, Case(model=None), "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # what comes next must wait for it
        one.operands.grad.mul_(2)
        gpu.step(s3_update, [one.operands], **OPTIONS)
    torch.cuda.current_stream().wait_stream(side)
    doubled = Operands(one.start.param, one.start.grad * 2, one.start.state, one.start.model_param)
    theirs = stepped(doubled, "cpu", **OPTIONS)
    right = all(bitwise(a, b.to(a.dtype)) for _, a, b in _pairs(one.operands, theirs))
    if right:
        writer.passed("another stream", "bitwise")
    else:
        writer.failed("another stream", "the step did not wait for its stream's own gradients")


def _other_gpu(writer: Writer) -> None:
    """Tensors on another GPU than the current one."""
    from megatron_s3.kernels import gpu

    if torch.cuda.device_count() < 2:
        writer.skipped("another GPU than the current one", "there is one GPU")
        return
    torch.cuda.set_device(0)
    one = Placed(100_000, Case(), "cuda:1")
    gpu.step(s3_update, [one.operands], **OPTIONS)
    found = compare(one, interpreted=False, device="cuda:1", **OPTIONS)
    if found:
        writer.failed("another GPU than the current one", found)
    else:
        writer.passed("another GPU than the current one", "bitwise")
