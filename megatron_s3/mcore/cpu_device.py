"""Runs Megatron's trainer on the CPU with gloo, for laptops, tests and first runs.

Megatron-LM uses the device name ``cuda`` throughout. ``use_cpu`` gives this name a meaning on a
machine without a GPU, inside torch and for the whole process; Megatron itself is not changed. It
must run before Megatron is imported, because Megatron takes some of the names at import.
``_replacements`` is the only table of replaced objects; ``_CudaIsCpu`` rewrites arguments, not
names.

Losses are those of the CPU's kernels, times have no relation to a GPU's, and memory figures are 0.
"""

import collections
import contextlib
import logging
import operator
import os
import types
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
#: Per process: replacements in torch apply to the whole process and are made once.
_active = False


def _nothing(*args: object, **kwargs: object) -> None:
    """Replaces calls that have no meaning on the CPU."""


def _zero(*args: object, **kwargs: object) -> int:
    return 0


def _context(*args: object, **kwargs: object) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


class _Immediate:
    """A CUDA stream or event on a device on which each call finishes its work."""

    device = _CPU
    cuda_stream = 0

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "_Immediate") -> float:
        return 0.0

    def record_event(self, event: "_Immediate | None" = None) -> "_Immediate":
        return event or _Immediate()

    record = synchronize = wait = wait_event = wait_stream = _nothing


# Compute capability 10 is the first for which Megatron does not check CUDA_DEVICE_MAX_CONNECTIONS:
# below it, tensor parallelism requires 1 and Megatron-FSDP another value.
_PROPERTIES = types.SimpleNamespace(
    name="CPU", major=10, minor=0, total_memory=1 << 40, multi_processor_count=1
)


def _replacements() -> dict[str, object]:
    """Returns all replacements in torch, by name below ``torch.``."""
    generator = torch.default_generator
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    get_context = torch.multiprocessing.get_context
    exchange = torch.distributed.all_to_all_single
    send = torch.distributed.isend
    start = torch.utils.data.dataloader._BaseDataLoaderIter.__init__
    mesh_from_group = torch.distributed.device_mesh.DeviceMesh.from_group

    def get_rng_state(device: object = None) -> torch.Tensor:
        return generator.get_state()

    def set_rng_state(state: torch.Tensor, device: object = None) -> None:
        generator.set_state(state)

    def start_loading(self: Any, loader: Any) -> None:
        state = generator.get_state()
        start(self, loader)
        generator.set_state(state)

    def all_to_all_single(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        **kwargs: Any,
    ) -> Any:
        received, sent = (
            size.tolist() if isinstance(size, torch.Tensor) else size
            for size in (output_split_sizes, input_split_sizes)
        )
        return exchange(output, input, received, sent, **kwargs)

    def isend(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return send(tensor.detach(), *args, **kwargs)

    def from_group(group: Any, device_type: Any, *args: Any, **kwargs: Any) -> Any:
        return mesh_from_group(
            group, "cpu" if _is_cuda(device_type) else device_type, *args, **kwargs
        )

    return {
        # One device for each process, always number 0, because nothing here distinguishes them. An
        # int, because Megatron-FSDP compares it.
        "cuda.is_available": lambda: True,
        "cuda.is_initialized": lambda: True,
        "cuda.init": _nothing,
        "cuda._lazy_init": _nothing,
        "cuda._lazy_call": lambda call, **kwargs: call(),
        "cuda.device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "cuda.current_device": lambda: 0,
        "cuda.set_device": _nothing,
        "cuda.device": _context,
        "cuda.get_device_name": lambda device=None: _PROPERTIES.name,
        "cuda.get_device_capability": lambda device=None: (_PROPERTIES.major, _PROPERTIES.minor),
        "cuda.get_device_properties": lambda device=None: _PROPERTIES,
        "cuda.is_bf16_supported": lambda including_emulation=True: True,
        "cuda.utilization": _zero,
        "cuda.check_error": _nothing,
        # Inside torch (data loader, optimizers) the CPU keeps its name.
        "accelerator.is_available": lambda: False,
        "accelerator.current_accelerator": lambda check_available=False: None,
        # Random numbers come from the CPU's generator, which torch.manual_seed has already seeded
        # when it calls manual_seed_all.
        "cuda.default_generators": (generator,) * ranks,
        "cuda.manual_seed": generator.manual_seed,
        "cuda.random.manual_seed": generator.manual_seed,
        "cuda.manual_seed_all": _nothing,
        "cuda.random.manual_seed_all": _nothing,
        "cuda.get_rng_state": get_rng_state,
        "cuda.random.get_rng_state": get_rng_state,
        "cuda.set_rng_state": set_rng_state,
        "cuda.random.set_rng_state": set_rng_state,
        # A data loader uses the CPU's generator, which must not advance CUDA's: tensor-parallel
        # ranks without a loader need the same dropout as ranks with one.
        "utils.data.dataloader._BaseDataLoaderIter.__init__": start_loading,
        # Each call finishes its work.
        "cuda.synchronize": _nothing,
        "cuda.Stream": _Immediate,
        "cuda.Event": _Immediate,
        "cuda.stream": _context,
        "cuda.set_stream": _nothing,
        "cuda.current_stream": _Immediate,
        "cuda.default_stream": _Immediate,
        "Tensor.record_stream": _nothing,
        "cuda.is_current_stream_capturing": lambda: False,
        "cuda.nvtx.range_push": _nothing,
        "cuda.nvtx.range_pop": _nothing,
        "cuda.nvtx.mark": _nothing,
        # There is no device memory to report.
        "cuda.empty_cache": _nothing,
        "cuda.reset_peak_memory_stats": _nothing,
        "cuda.memory_allocated": _zero,
        "cuda.max_memory_allocated": _zero,
        "cuda.memory_reserved": _zero,
        "cuda.max_memory_reserved": _zero,
        "cuda.device_memory_used": _zero,
        "cuda.memory_stats": lambda device=None: collections.defaultdict(int),
        "cuda.mem_get_info": lambda device=None: (_PROPERTIES.total_memory,) * 2,
        # Tensor types that are called as constructors.
        "cuda.FloatTensor": torch.FloatTensor,
        "cuda.HalfTensor": torch.HalfTensor,
        "cuda.BFloat16Tensor": torch.BFloat16Tensor,
        "cuda.LongTensor": torch.LongTensor,
        "cuda.IntTensor": torch.IntTensor,
        "cuda.ByteTensor": torch.ByteTensor,
        # Megatron converts the split sizes to lists only if their tensor is on a CUDA device
        # (``moe_utils.maybe_move_tensor_to_cpu``), and torch accepts no tensors for them.
        "distributed.all_to_all_single": all_to_all_single,
        # Gloo reads the data after the call has returned. The interleaved pipeline schedule before
        # 0.18 has freed them by then (``schedules.deallocate_output_tensor``); a view keeps them.
        "distributed.isend": isend,
        "distributed.distributed_c10d.isend": isend,
        # Torch FSDP2 compares the device of the parameters with that of its mesh.
        "distributed.device_mesh.DeviceMesh.from_group": staticmethod(from_group),
        # Its checkpoint writer is a separate process. Megatron spawns it to keep CUDA out of it;
        # here it is forked, to keep the replacements.
        "multiprocessing.get_context": lambda method=None: get_context("fork"),
    }


class _CudaIsCpu(TorchFunctionMode):
    """Rewrites ``device="cuda"``, ``device=<int>`` and the tensor methods of CUDA to the CPU."""

    def __torch_function__(
        self,
        func: Any,
        kinds: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # DistributedOptimizer recognizes 16-bit parameters by "torch.cuda.HalfTensor" and
            # similar names.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        result = func(*args, **kwargs)
        if func is torch.Tensor.to and result is args[0] and kwargs.get("non_blocking"):
            # A copy, as from a device: an asynchronous save writes it while training continues.
            return result.clone()
        return result


def _is_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.split(":")[0] == "cuda"
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return type(device) is int


def use_cpu() -> None:
    """Makes torch's ``cuda`` names mean the CPU, for the rest of the process.

    Applies ``_replacements``, enters a ``TorchFunctionMode`` in the calling thread, which must be
    the thread that trains, and disables torch.compile, which cannot handle either. Call it before
    Megatron is imported. A second call does nothing.
    """
    global _active
    if _active:
        return
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # Imported now, because it indexes the functions of torch. The stance is for functions that were
    # passed to torch.compile before, if a hook inside Megatron calls this function.
    import torch._dynamo

    torch.compiler.set_stance("force_eager")

    for name, replacement in _replacements().items():
        owner, _, attribute = name.rpartition(".")
        setattr(operator.attrgetter(owner)(torch), attribute, replacement)
    _CudaIsCpu().__enter__()  # type: ignore[no-untyped-call]
    # With one generator for both devices this happens, by design, with each use of dropout.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    _active = True


def active() -> bool:
    """Returns whether ``use_cpu`` has run in this process."""
    return _active


def select(device: str) -> str:
    """Chooses the device that Megatron trains on, and prepares torch for it.

    The first rank of each node (``LOCAL_RANK`` in the environment) prints one line if this is the
    CPU, because the other nodes may have GPUs.

    Args:
        device: "cuda", "cpu", or "auto": CUDA if torch sees a device, else the CPU.

    Returns:
        "cuda" or "cpu".

    Raises:
        RuntimeError: ``device`` is "cuda" and there is no CUDA device, or the process uses the CPU
            already.
        ValueError: ``device`` is another word.
    """
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f"--plugin-device {device}: expected auto, cuda or cpu")
    has_cuda = not _active and torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        reason = "the process is on the CPU already" if _active else "torch sees no CUDA device"
        raise RuntimeError(f"--plugin-device cuda: {reason}; use --plugin-device cpu, or auto")
    if device == "cuda" or (device == "auto" and has_cuda):
        return "cuda"
    rank = os.environ.get("RANK", "0")
    if not _active and os.environ.get("LOCAL_RANK", rank) == "0":
        reason = "--plugin-device cpu" if device == "cpu" else "torch sees no CUDA device"
        who = "training" if rank == "0" else f"rank {rank} trains"
        print(f"[megatron_s3] {who} on the CPU with gloo ({reason})", flush=True)
    use_cpu()
    return "cpu"
