"""The implementations of the step that the benchmark compares: S3, and AdamWs in phases."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from megatron_s3 import S3
from megatron_s3.kernels import cpu
from megatron_s3.kernels.operands import Operands
from megatron_s3.kernels.statistics import Statistics
from megatron_s3.optimizers import OPTIMIZERS
from megatron_s3.rules.s3 import s3_update
from scripts.bench.memory import Memory

__all__ = ["BASELINE", "BASELINES", "HALF", "UNCLIPPED", "Candidate", "candidates"]

#: Keys of the baselines, to each of which there is a ratio.
BASELINE, UNCLIPPED, HALF = "adamw-fused", "adamw-fused-unclipped", "adamw-fused-bf16"
BASELINES = (BASELINE, UNCLIPPED, HALF)
#: Number of elements that fit in a core's own cache, with their gradients and states.
IN_CACHE = 32768

# Bytes per parameter that a phase reads and writes, counted by hand.
NORM, CLIP, ADAM, COPY = 4, 4 + 4, 4 + 8 + 8 + 8, 4 + 2
_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def s3_bytes(grad: torch.dtype, state: torch.dtype) -> int:
    """Returns the bytes per parameter of S3's pass.

    It reads g, reads and writes x, m and r, and writes the bf16 parameter.
    """
    return grad.itemsize + 2 * 4 + 2 * 2 * state.itemsize + 2


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
