#!/usr/bin/env python3
"""Measures the step of S3 and of AdamW, on the shards of one rank of a real job.

    python -m scripts.bench.step [--device cpu|cuda] [--shapes 345m-dp8 7b-dp64 flat] [...]

AdamW's step consists of Megatron's phases: gradient norm, clipping, optimizer, and the copy to the
bf16 model parameters.  Megatron clips only while the norm exceeds the limit, so AdamW is measured
with clipping and without it.  S3's step is one pass, which also writes the bf16 model parameters;
it is measured with the statistics that a training run logs, and without them.  AdamW is also
measured with 16-bit gradients and states, beside which S3's figures with these belong.  Each
round measures every candidate once, in random order, so that other load on the machine and the
contents of the caches affect all candidates alike.  Ratios are computed within a round.

Gradients and model parameters are views of one buffer each, at Megatron's distances (gaps are
shortened by multiples of 4096 elements).  Main parameters and states are separate tensors, as in
Megatron.  All candidates use the same memory.

On a GPU there are three times.  The wall time begins on an empty stream and ends when the work is
done.  The host time ends when the call returns; with many small shards it is most of the wall time.
The device time is measured between two events on a stream that was kept busy until the host had
launched everything; a candidate for which the host waits in between has no such time of its own.
The L2 cache is not flushed: shards are larger than it, and all candidates have the same of it.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_s3 import S3
from megatron_s3.kernels import cpu
from megatron_s3.kernels.operands import Operands
from megatron_s3.kernels.statistics import Statistics
from megatron_s3.optimizers import OPTIMIZERS
from megatron_s3.rules.s3 import s3_update
from scripts.bench import timing as bench
from scripts.bench.commit import commit
from scripts.bench.shards import Shard

ROOT = Path(__file__).resolve().parents[2]
#: Shapes by name: a configuration of the package, and the number of GPUs.
SHAPES = {
    "64m-dp1": ("gpt2-345m-paper-s3", 1),
    "345m-dp8": ("layouts/gpt2-345m/8gpu", 8),
    "7b-dp64": ("layouts/gpt2-7b/512gpu", 128),  # tensor parallelism of 2
}
FLAT = {"cpu": 1 << 26, "cuda": 1 << 28}
#: Number of elements of the copied tensor, which is too large for any cache.
COPIED = {"cpu": 1 << 26, "cuda": 1 << 28}
BASELINE = "adamw-fused"
#: Keys of the baselines, to each of which there is a ratio.
UNCLIPPED, HALF = "adamw-fused-unclipped", "adamw-fused-bf16"
BASELINES = (BASELINE, UNCLIPPED, HALF)
#: Number of elements that fit in a core's own cache, with their gradients and states.
IN_CACHE = 32768
#: Distances in a buffer are kept modulo this many elements.
_PAGE = 4096
#: Bytes per parameter that this benchmark needs: x, g, m and v in fp32 and in bf16, and temporaries
#: of foreach or states of Transformer Engine and Apex.
_BYTES_HERE = 16 + 8 + 16

# Bytes per parameter that a phase reads and writes, counted by hand.
NORM, CLIP, ADAM, COPY = 4, 4 + 4, 4 + 8 + 8 + 8, 4 + 2
_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def s3_bytes(grad: torch.dtype, state: torch.dtype) -> int:
    """Returns the bytes per parameter of S3's pass.

    It reads g, reads and writes x, m and r, and writes the bf16 parameter.
    """
    return grad.itemsize + 2 * 4 + 2 * 2 * state.itemsize + 2


class Unavailable(Exception):
    """Raised if a shape or device is not available; the message says why."""


# ---- data ----------------------------------------------------------------------------------------


def shards_of(shape: str, rank: int, device: str, known: Path | None = None) -> list[Shard]:
    """Returns a rank's shards; Megatron runs in a separate process without a GPU.

    Args:
        shape: one of :data:`SHAPES`, or "flat".
        rank: number of the rank.
        device: "cpu" or "cuda".
        known: a JSON file of shards by shape and rank; what it lacks is added to it.

    Raises:
        Unavailable: Megatron is not installed, or it rejects the configuration.
    """
    if shape == "flat":
        return [Shard(FLAT[device], 0, 0, 0)]
    stored = json.loads(known.read_text()) if known is not None and known.exists() else {}
    key = f"{shape}, rank {rank}"
    if key not in stored:
        stored[key] = _asked(shape, rank)
        if known is not None:
            known.write_text(json.dumps(stored) + "\n", encoding="utf-8")
    return [Shard(*values) for values in stored[key]]


def _asked(shape: str, rank: int) -> list[list[int]]:
    config, gpus = SHAPES[shape]
    command = [sys.executable, "-m", "scripts.bench.shards", config, "--gpus", str(gpus)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [*command, "--rank", str(rank)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise Unavailable(
            f"{shape}: {lines[-1].removeprefix('error: ')} (flat needs no megatron-core)"
        )
    found: list[list[int]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def cut(shards: Sequence[Shard], limit: int) -> list[Shard]:
    """Returns the first shards up to ``limit`` elements in total; the last one is truncated."""
    kept, left = [], limit
    for shard in shards:
        if left <= 0:
            break
        kept.append(Shard(min(shard.numel, left), shard.offset, shard.buffer, shard.group))
        left -= shard.numel
    return kept


def placed(shards: Sequence[Shard]) -> tuple[list[int], int]:
    """Returns each shard's place in a buffer of this rank's shards alone, and its length."""
    starts, end = [0] * len(shards), 0
    order = sorted(range(len(shards)), key=lambda i: (shards[i].buffer, shards[i].offset))
    for i in order:
        starts[i] = end + (shards[i].offset - end) % _PAGE
        end = starts[i] + shards[i].numel
    return starts, end


class Memory:
    """The tensors of all candidates.

    Attributes:
        groups: indices of the shards of each param group.
        params: main parameters, fp32.
        grads: gradients by dtype; views of one buffer.
        states: the two states of each shard by dtype.
        model_params: model parameters, bf16; views of one buffer.
        copied: source and destination of the large copy.
        norms: the norm of the gradients by dtype, kept on the host to avoid a synchronization.
    """

    def __init__(self, shards: Sequence[Shard], device: str) -> None:
        generator = torch.Generator(device).manual_seed(1)
        starts, length = placed(shards)
        spans = [(start, s.numel) for start, s in zip(starts, shards, strict=True)]
        groups: dict[int, list[int]] = {}
        for i, shard in enumerate(shards):
            groups.setdefault(shard.group, []).append(i)
        self.groups = list(groups.values())
        self.elements = sum(n for _, n in spans)
        fp32, bf16 = torch.float32, torch.bfloat16

        def views(buffer: Tensor) -> list[Tensor]:
            return [buffer[start : start + n] for start, n in spans]

        gradients = torch.empty(length, device=device).normal_(0, 1e-3, generator=generator)
        self.grads = {fp32: views(gradients), bf16: views(gradients.bfloat16())}
        self.model_params = views(torch.zeros(length, device=device, dtype=bf16))
        self.params = [
            torch.empty(n, device=device).normal_(0, 0.02, generator=generator) for _, n in spans
        ]
        self.states = {
            dtype: [
                tuple(torch.zeros(n, device=device, dtype=dtype) for _ in range(2))
                for _, n in spans
            ]
            for dtype in (fp32, bf16)
        }
        self.norms = {
            dtype: float(torch.nn.utils.get_total_norm(grads))
            for dtype, grads in self.grads.items()
        }
        count = COPIED[device]
        self.copied = (torch.ones(count, device=device), torch.empty(count, device=device))

    def param_groups(
        self, of: Sequence[Tensor] | None = None
    ) -> tuple[list[dict], list[torch.nn.Parameter]]:
        """Returns param groups for one optimizer, and their parameters in the order of the shards.

        Gradients are attributes of a parameter, so each candidate has its own parameters on the
        shared memory: that of the main parameters, or of the tensors ``of``.
        """
        params = [torch.nn.Parameter(p, requires_grad=True) for p in of or self.params]
        return [{"params": [params[i] for i in group]} for group in self.groups], params

    def check(self) -> None:
        """Raises ArithmeticError unless everything is finite."""
        states = [t for both in self.states.values() for pair in both for t in pair]
        for tensor in (*self.params, *self.model_params, *states, *self.grads[torch.float32]):
            if not bool(tensor.isfinite().all()):
                raise ArithmeticError("a step has left NaN or inf behind: its time says nothing")


# ---- candidates ----------------------------------------------------------------------------------


@dataclass
class Candidate:
    """An implementation of the step.

    Attributes:
        key: short name, as in :class:`scripts.bench.timing.Timing`.
        label: name in the table and the picture.
        kind: group of candidates, as in :class:`scripts.bench.timing.Timing`.
        phases: name, bytes per parameter and function of each phase of the step, in order.
        path: returns the name of the implementation that ran.
        in_cache: the same work on memory that fits in a core's own cache, to measure the time
            without memory accesses; or None.
    """

    key: str
    label: str
    kind: str
    phases: list[tuple[str, float, Callable[[], object]]]
    path: Callable[[], str] = field(default=lambda: "")
    in_cache: Callable[[], object] | None = None

    def step(self) -> None:
        """Performs a step."""
        for _, _, phase in self.phases:
            phase()

    @property
    def bytes_per_parameter(self) -> float:
        """Returns the bytes per parameter of a step."""
        return sum(count for _, count, _ in self.phases)


class MegatronAdamW:
    """Megatron's phases with an AdamW, and with torch's functions for norm and clipping.

    Args:
        memory: the tensors.
        make: makes the optimizer of param groups.
        grad: dtype of the gradients.
        of: the parameters, if they are not the main parameters.
    """

    def __init__(
        self,
        memory: Memory,
        make: Callable[..., torch.optim.Optimizer],
        grad: torch.dtype = torch.float32,
        of: Sequence[Tensor] | None = None,
    ) -> None:
        self.memory, self.dtype = memory, grad
        self.grads = memory.grads[grad]
        groups, self.params = memory.param_groups(of)
        for param, gradient in zip(self.params, self.grads, strict=True):
            if param.dtype == grad:
                param.grad = gradient
            else:
                param.decoupled_grad = gradient
        self.optimizer = make(groups, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        self.total: Tensor | float = memory.norms[grad]

    def norm(self) -> None:
        """Computes the norm of all gradients."""
        self.total = torch.nn.utils.get_total_norm(self.grads, foreach=True)

    def limit(self) -> float:
        """Returns a limit that clips by a factor of only 1 - 1e-4, to keep the gradients' size.

        Gradients in bf16 then stay as they are, which takes as long.
        """
        if self.dtype == torch.float32:
            self.memory.norms[self.dtype] *= 1 - 1e-4
            return self.memory.norms[self.dtype]
        return self.memory.norms[self.dtype] * (1 - 1e-4)

    @torch.no_grad()
    def clip(self) -> None:
        """Clips the gradients in place, as torch.nn.utils.clip_grads_with_norm_ does."""
        coefficient = torch.as_tensor(self.limit() / (self.total + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(self.grads, coefficient.to(self.grads[0].device))

    @torch.no_grad()
    def copy(self) -> None:
        """Copies to the model parameters one by one, as DistributedOptimizer does."""
        for model, main in zip(self.memory.model_params, self.params, strict=True):
            model.copy_(main)

    def candidate(self, key: str, label: str, clips: bool = True) -> Candidate:
        """Returns the candidate with its phases; without clipping where the norm is small."""
        phases = [("norm", NORM, self.norm), ("clip", CLIP, self.clip)]
        phases += [("step", ADAM, self.optimizer.step), ("copy", COPY, self.copy)]
        return Candidate(
            key,
            label,
            "adamw",
            [phase for phase in phases if clips or phase[0] != "clip"],
            lambda: type(self.optimizer).__module__,
        )


class MultiTensorAdamW(MegatronAdamW):
    """The same with the multi-tensor kernels that Megatron uses if they are installed."""

    def __init__(self, memory: Memory, make: Callable, tools: dict[str, Callable]) -> None:
        super().__init__(memory, make)
        self.tools = tools

    def norm(self) -> None:
        """Computes the norm like Megatron's get_grad_norm_fp32."""
        overflow = torch.zeros(1, dtype=torch.int, device="cuda")
        norm, _ = self.tools["apply"](self.tools["norm"], overflow, [self.grads], False)
        total = norm**2.0  # Megatron then sums it over ranks
        # Without a kernel that reads the factor from the device, the host waits for the norm.
        self.total = total.pow(0.5) if self.tools["scale_tensor"] else total.item() ** 0.5

    def clip(self) -> None:
        """Clips like Megatron's clip_grad_by_total_norm_fp32."""
        coefficient = self.limit() / (self.total + 1e-6)
        overflow = torch.zeros(1, dtype=torch.int, device="cuda")
        scale = self.tools["scale"]
        if isinstance(coefficient, Tensor):
            coefficient.clamp_max_(1.0)
            scale = self.tools["scale_tensor"]
        self.tools["apply"](scale, overflow, [self.grads, self.grads], coefficient)


def adamw(memory: Memory, name: str) -> MegatronAdamW:
    """Returns torch's AdamW on the shared states; ``name`` is "fused" or "foreach"."""
    made = MegatronAdamW(memory, partial(torch.optim.AdamW, **{name: True}))
    _shared(made, memory.states[torch.float32], name)
    return made


def _shared(made: MegatronAdamW, states: Sequence[tuple[Tensor, ...]], name: str) -> None:
    for param, (first, second) in zip(made.params, states, strict=True):
        step = torch.zeros((), device=param.device if name == "fused" else "cpu")
        made.optimizer.state[param] = {"step": step, "exp_avg": first, "exp_avg_sq": second}


def half_adamw(memory: Memory) -> Candidate:
    """Returns torch's AdamW with parameters, gradients and states in bf16.

    It moves the fewest bytes of all AdamWs in torch, and rounds the parameters to bf16.
    """
    bf16 = torch.bfloat16
    made = MegatronAdamW(memory, partial(torch.optim.AdamW, fused=True), bf16, memory.model_params)
    _shared(made, memory.states[bf16], "fused")
    return Candidate(
        HALF,
        "AdamW, torch fused, all bf16",
        "adamw",
        [
            ("norm", NORM / 2, made.norm),
            ("clip", CLIP / 2, made.clip),
            ("step", ADAM / 2, made.optimizer.step),
        ],
        lambda: type(made.optimizer).__module__,
    )


def multi_tensor_adamws(memory: Memory) -> Iterator[Candidate]:
    """Yields the AdamW of Transformer Engine and of Apex, if they are installed."""
    with contextlib.suppress(ImportError):
        from transformer_engine.pytorch import optimizers as te

        tools = {
            "apply": te.multi_tensor_applier,
            "norm": te.multi_tensor_l2norm,
            "scale": te.multi_tensor_scale,
            "scale_tensor": getattr(te, "multi_tensor_scale_tensor", None),
        }
        made = MultiTensorAdamW(memory, partial(te.FusedAdam, adam_w_mode=True), tools)
        yield made.candidate("adamw-te", "AdamW, Transformer Engine")
    with contextlib.suppress(ImportError):
        import amp_C
        from apex.multi_tensor_apply import multi_tensor_applier
        from apex.optimizers import FusedAdam

        tools = {
            "apply": multi_tensor_applier,
            "norm": amp_C.multi_tensor_l2norm,
            "scale": amp_C.multi_tensor_scale,
            "scale_tensor": None,
        }
        made = MultiTensorAdamW(memory, partial(FusedAdam, adam_w_mode=True), tools)
        yield made.candidate("adamw-apex", "AdamW, Apex")


def s3(
    memory: Memory,
    fused: bool,
    p: float,
    grad: torch.dtype,
    state: torch.dtype,
    statistics: bool = False,
) -> Candidate:
    """Returns S3 with gradients and states of these dtypes."""
    groups, params = memory.param_groups()
    optimizer = S3(groups, lr=1e-4, p=p, weight_decay=0.1, fused=fused, state_dtype=state)
    if statistics:
        optimizer.host.statistics = Statistics(params[0].device)
    for i, param in enumerate(params):
        if grad == torch.float32:
            param.grad = memory.grads[grad][i]
        else:
            param.decoupled_grad = memory.grads[grad][i]
        first, second = memory.states[state][i]
        optimizer.state[param] = {"exp_avg": first, "exp_pnorm": second}
        optimizer.host.model_params[param] = memory.model_params[i]
    path = "portable"
    if fused:
        path = "triton" if params[0].is_cuda else "cpp"
    name = {"portable": "portable", "triton": "Triton", "cpp": "C++"}[path]
    key = f"s3-{path}-p{p:g}-{_SHORT[grad]}-grads-{_SHORT[state]}-states"
    label = f"S3 {name} p={p:g}, {_SHORT[grad]} grads, {_SHORT[state]} states"
    return Candidate(
        key + ("-statistics" if statistics else ""),
        label + (", statistics" if statistics else ""),
        "kernel" if fused else "portable",
        [("step", s3_bytes(grad, state), optimizer.step)],
        lambda: optimizer.path,
        in_cache(memory.elements, p, grad, state) if path == "cpp" and not statistics else None,
    )


def small(memory: Memory, p: float, statistics: bool = False) -> Candidate:
    """Returns S3 with 7 bytes an element: int8 and bf16 states, bf16 parameters and remainders.

    Its step reads and writes parameter, remainder and both states, and reads a gradient in bf16.
    """
    bf16 = torch.bfloat16
    groups, params = memory.param_groups(memory.model_params)
    dtypes = {"exp_avg": torch.int8, "exp_pnorm": bf16}
    optimizer = S3(groups, lr=1e-4, p=p, weight_decay=0.1, fused=True, state_dtype=dtypes)
    optimizer.host.master_params = optimizer.host.remainders = True
    if statistics:
        optimizer.host.statistics = Statistics(params[0].device)
    for param, gradient in zip(params, memory.grads[bf16], strict=True):
        param.decoupled_grad = gradient
    path, name = ("triton", "Triton") if params[0].is_cuda else ("cpp", "C++")
    return Candidate(
        f"s3-{path}-p{p:g}-bf16-grads-small-states" + ("-statistics" if statistics else ""),
        f"S3 {name} p={p:g}, bf16 grads, 7 bytes" + (", statistics" if statistics else ""),
        "kernel",
        [("step", 2 + 2 * (2 + 2 + 1 + 2), optimizer.step)],
        lambda: optimizer.path,
    )


def other(memory: Memory, name: str) -> Candidate:
    """Returns the kernel of another optimizer of the plugin, with Megatron's default clipping."""
    label = OPTIMIZERS[name].description.label
    made = MegatronAdamW(memory, lambda groups, **_: OPTIMIZERS[name](groups, lr=1e-4, fused=True))
    states = OPTIMIZERS[name].description.state
    for i, param in enumerate(made.params):
        # A state that is never negative must not share memory with others; further states are new.
        first, second = memory.states[torch.float32][i]
        shared = {states[0]: first, "exp_avg_sq": second}
        made.optimizer.state[param] = {
            state: shared[state] if state in shared else torch.zeros_like(first) for state in states
        }
        made.optimizer.host.model_params[param] = memory.model_params[i]
    count = 4 + 2 * 4 + 2 * 4 * len(states) + 2
    path = "triton" if made.params[0].is_cuda else "cpp"
    phases = [("norm", NORM, made.norm), ("clip", CLIP, made.clip)]
    phases.append(("step", count, made.optimizer.step))
    return Candidate(
        f"{name}-{path}", f"{label}, ours", "other", phases, lambda: made.optimizer.path
    )


def in_cache(elements: int, p: float, grad: torch.dtype, state: torch.dtype) -> Callable:
    """Returns a step of the C++ kernel on as many elements, with each thread reusing 32,768."""
    generator = torch.Generator().manual_seed(1)

    def operands() -> Operands:
        gradient = torch.empty(IN_CACHE).normal_(0, 1e-3, generator=generator).to(grad)
        states = tuple(torch.zeros(IN_CACHE, dtype=state) for _ in range(2))
        return Operands(
            torch.ones(IN_CACHE), gradient, states, torch.ones(IN_CACHE, dtype=torch.bfloat16)
        )

    threads = torch.get_num_threads()
    share = [operands() for _ in range(threads)]
    work = [one for one in share for _ in range(max(1, round(elements / IN_CACHE / threads)))]
    return lambda: cpu.step(s3_update, work, lr=1e-4, weight_decay=0.1, beta=0.95, p=p)


def candidates(
    memory: Memory, device: str, ps: Sequence[float], others: Sequence[str] = ()
) -> Iterator[Candidate]:
    """Yields all candidates that can run here, the baseline first."""
    yield adamw(memory, "fused").candidate(BASELINE, "AdamW, torch fused")
    yield adamw(memory, "fused").candidate(UNCLIPPED, "AdamW, torch fused, not clipped", False)
    yield half_adamw(memory)
    yield adamw(memory, "foreach").candidate("adamw-foreach", "AdamW, torch foreach")
    if device == "cuda":
        yield from multi_tensor_adamws(memory)
    fp32, bf16 = torch.float32, torch.bfloat16
    dtypes = ((fp32, fp32), (bf16, fp32), (fp32, bf16), (bf16, bf16))
    for fused in (True, False):
        for p in ps:
            for grad, state in dtypes:
                yield s3(memory, fused, p, grad, state)
                if fused and grad == state:
                    yield s3(memory, fused, p, grad, state, statistics=True)
            if fused:
                yield small(memory, p)
                yield small(memory, p, statistics=True)
    for name in others:
        yield other(memory, name)


# ---- measuring -----------------------------------------------------------------------------------


#: Milliseconds by which a stream is kept busy longer than the host took the last time.
_AHEAD = 0.5


def timed(call: Callable[[], object], device: str) -> tuple[float, float, float]:
    """Returns milliseconds: wall, host and device; on a CPU all three are the wall time."""
    if device == "cpu":
        begin = time.perf_counter()
        call()
        ms = 1e3 * (time.perf_counter() - begin)
        return ms, ms, ms
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    host = 1e3 * (time.perf_counter() - begin)
    torch.cuda.synchronize()
    wall = 1e3 * (time.perf_counter() - begin)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int((1.5 * host + _AHEAD) * 2e6))  # clocks, of which 2e6 are a millisecond
    start.record()
    call()
    end.record()
    end.synchronize()
    return wall, host, start.elapsed_time(end)


_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync")


def launches(call: Callable[[], object], device: str) -> int | None:
    """Returns the number of launches of a call, from torch's profiler; None on a CPU."""
    if device == "cpu":
        return None
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.name.startswith(_LAUNCHES) for event in profile.events())


def say(text: str) -> None:
    """Prints progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def compare(
    shape: str,
    shards: Sequence[Shard],
    options: argparse.Namespace,
    threads: int | None,
) -> bench.Comparison:
    """Measures all candidates on one list of shards."""
    device = options.device
    kept = cut(shards, options.elements_limit)
    memory = Memory(kept, device)
    chosen = [
        c
        for c in candidates(memory, device, options.p, options.optimizers)
        if c.key in BASELINES or not options.only or any(word in c.key for word in options.only)
    ]
    name = shape if threads is None else f"{shape}, threads {threads}"
    usable = []
    for candidate in chosen:
        say(f"{name}: warm-up of {candidate.key}")
        try:
            for _ in range(1 if device == "cpu" else 3):
                candidate.step()
        except RuntimeError as error:
            if candidate.kind not in ("kernel", "other"):
                raise
            say(f"{name}: {candidate.key} is left out: {error}")
            continue
        usable.append(candidate)
    # Each round measures these calls: a candidate's step, then its phases one by one.
    calls: dict[str, list[tuple[str, Callable[[], object]]]] = {
        c.key: [(c.key, c.step)]
        + [(f"{c.key}/{phase}", call) for phase, _, call in c.phases if len(c.phases) > 1]
        for c in usable
    }
    for c in usable:
        if c.in_cache is not None:
            calls[c.key].append((f"{c.key}/in cache", c.in_cache))
    calls["copy"] = [("copy", lambda: memory.copied[1].copy_(memory.copied[0]))]
    memory.copied[1].copy_(memory.copied[0])
    order, drawn = list(calls), random.Random(1)
    times: dict[str, list[tuple[float, float, float]]] = {}
    before = clocks(device)
    for turn in range(options.rounds):
        say(f"{name}: round {turn + 1} of {options.rounds}")
        drawn.shuffle(order)
        for key in order:
            for part, call in calls[key]:
                times.setdefault(part, []).append(timed(call, device))
    memory.check()

    def timing(key: str, label: str, kind: str, count: float, call: Callable, path: str = ""):
        wall, host, alone = zip(*times[key], strict=True)
        number = launches(call, device)
        return bench.Timing(key, label, kind, count, wall, host, alone, number, path)

    timings = []
    for c in usable:
        timings.append(timing(c.key, c.label, c.kind, c.bytes_per_parameter, c.step, c.path()))
        if len(c.phases) > 1:
            timings += [
                timing(f"{c.key}/{phase}", phase, "phase", count, call)
                for phase, count, call in c.phases
            ]
        if c.in_cache is not None:
            count = c.bytes_per_parameter
            timings.append(
                timing(f"{c.key}/in cache", "from the cache", "phase", count, c.in_cache)
            )
    total = sum(shard.numel for shard in shards)
    return bench.Comparison(
        shape=shape,
        elements=memory.elements,
        shards=len(kept),
        cut_from=total if total > memory.elements else None,
        device=device,
        threads=threads,
        baselines=[key for key in BASELINES if any(c.key == key for c in usable)],
        copy_bytes=2 * memory.copied[0].nbytes,
        copy_ms=[ms for _, _, ms in times["copy"]],
        timings=timings,
        clocks=[before, clocks(device)],
    )


# ---- the machine, the command --------------------------------------------------------------------


def said(*command: str) -> str | None:
    """Returns the first line of a command's output; None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else None


#: What nvidia-smi is asked for before and after each shape.
_CLOCKS = "clocks.sm,clocks.mem,power.draw,temperature.gpu,utilization.gpu"


def clocks(device: str) -> str | None:
    """Returns the GPU's clocks, power, temperature and load as text; None on a CPU."""
    if device == "cpu":
        return None
    return said("nvidia-smi", f"--query-gpu={_CLOCKS}", "--format=csv,noheader") or "unknown"


def machine(device: str) -> dict:
    """Returns the properties of the machine on which the figures depend."""
    model = platform.processor()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    on_gpu = device == "cuda"
    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg(),  # more than this program's threads if others were running
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "driver": said(*driver) if on_gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
    }


def most_elements(device: str) -> int:
    """Returns the number of elements that fit in half of the free memory."""
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        with contextlib.suppress(
            OSError, StopIteration
        ):  # includes memory that the kernel can reclaim
            lines = Path("/proc/meminfo").read_text().splitlines()
            line = next(line for line in lines if line.startswith("MemAvailable"))
            free = 1024 * int(line.split()[1])
    free -= 2 * 4 * COPIED[device]
    return max(1, free // 2 // _BYTES_HERE)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints tables, and writes ``bench_step.json``, ``.txt`` and ``.png``.

    The files are written anew after each shape, so that a run that is ended leaves what it has.

    Returns:
        The exit status: 0, or 2 if a shape or device is not available.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--shapes", nargs="+", choices=(*SHAPES, "flat"), default=[*SHAPES, "flat"])
    parser.add_argument(
        "--elements-limit",
        type=_positive,
        metavar="N",
        help="largest number of elements; longer lists are truncated (default: what fits in half "
        "of the free memory)",
    )
    parser.add_argument(
        "--threads",
        type=_positive,
        nargs="+",
        help="numbers of threads on the CPU (default: torch's)",
    )
    parser.add_argument(
        "--rounds", type=_positive, help="number of rounds (default: 7 on the CPU, 50 on a GPU)"
    )
    parser.add_argument(
        "--p", type=float, nargs="+", default=[3.0], help="values of S3's p (default: 3)"
    )
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=[name for name in OPTIMIZERS if name != "s3"],
        default=[],
        help="other optimizers of the plugin to measure too, with their kernels",
    )
    parser.add_argument(
        "--rank", type=int, default=0, help="rank whose shards are used (default: 0)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="WORD",
        help="measure only candidates whose key contains a WORD",
    )
    parser.add_argument(
        "--shards",
        type=Path,
        metavar="FILE",
        help="keeps the shards, so that Megatron is asked for each shape and rank once",
    )
    parser.add_argument("--output", type=Path, default=Path("bench_step"), metavar="DIR")
    options = parser.parse_args(argv)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        return _refuse("--device cuda: torch sees no GPU here")
    options.rounds = options.rounds or (50 if options.device == "cuda" else 7)
    options.elements_limit = options.elements_limit or most_elements(options.device)
    try:
        import matplotlib  # noqa: F401 (checked before minutes of measuring)
    except ImportError:
        return _refuse("the picture needs matplotlib: pip install matplotlib")
    threads: list[int | None] = [None]
    if options.device == "cpu":
        threads = options.threads or [torch.get_num_threads()]
    before = torch.get_num_threads()
    comparisons = []
    try:
        for shape in options.shapes:
            say(f"{shape}: the shards of rank {options.rank}")
            shards = shards_of(shape, options.rank, options.device, options.shards)
            for number in threads:
                if number is not None:
                    torch.set_num_threads(number)
                comparisons.append(compare(shape, shards, options, number))
                _write(comparisons, options)
    except (Unavailable, ArithmeticError) as error:
        return _refuse(str(error))
    finally:
        torch.set_num_threads(before)
    print((options.output / "bench_step.txt").read_text(encoding="utf-8"), end="")
    return 0


def _write(comparisons: Sequence[bench.Comparison], options: argparse.Namespace) -> None:
    here = machine(options.device)
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **commit(),
        "machine": here,
        "options": {k: v for k, v in vars(options).items() if k not in ("output", "shards")},
        "bytes": "read and written, counted by hand, each tensor once in each phase that needs it",
        "ratios": "wall times, to each baseline's whole step in the same round",
        "times": "wall: from an empty stream until done; host: until the call returns; device: "
        "between events on a busy stream; one and the same on a CPU",
        "cache": "not flushed between candidates",
        "clocks": _CLOCKS,
        "comparisons": [c.as_json() for c in comparisons],
    }
    text = "\n\n".join([*(bench.table(c) for c in comparisons), bench.phases(comparisons)])
    options.output.mkdir(parents=True, exist_ok=True)
    part = options.output / "bench_step.part"
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(options.output / "bench_step.json")
    (options.output / "bench_step.txt").write_text(text + "\n", encoding="utf-8")
    title = f"Optimizer step on {here['gpu'] or here['cpu']}, torch {here['torch']}"
    bench.write_png(comparisons, title, options.output / "bench_step.png")
    say(f"written: {options.output}/bench_step.json, .txt, .png")


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _positive(word: str) -> int:
    number = int(float(word))  # 1e6 is allowed
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be above 0, not {word}")
    return number


if __name__ == "__main__":
    sys.exit(main())
