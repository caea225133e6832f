"""S3 in Adam's place in Megatron, and what stands in where there is no GPU and no network."""

import importlib
import importlib.util
import inspect
import itertools
import sys
import types
from collections import Counter
from typing import Any

import torch
from harness.layers import accept_parts_of_a_sequence

__all__ = ["built", "put", "steps"]

#: Of the process: parts of Megatron's optimizers, other optimizers, those that were exchanged.
_parts: list[Any] = []
_others: list[torch.optim.Optimizer] = []
_replaced: set[int] = set()
#: Steps by the optimizer's name.
steps: Counter[str] = Counter()
_seeds = itertools.count(1)


def put(optimizer: str) -> None:
    """Puts everything in its place, before upstream's conftest.py imports Megatron.

    Args:
        optimizer: what ``OptimizerConfig(optimizer="adam")`` becomes.
    """
    _take_gloo_for_nccl()
    _take_local_layers()
    _replace_adam(optimizer)
    _note_optimizers()
    _stay_offline()
    _fill_states()


def _name(kind: type) -> str:
    return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"


def built() -> list[str]:
    """Every optimizer of Megatron's with the torch optimizer in it; every other torch optimizer."""
    pairs = [(part, getattr(part, "optimizer", None)) for part in _parts]
    inner = {id(optimizer) for _, optimizer in pairs}
    names = {
        f"{type(part).__name__}({_name(type(optimizer))})"
        for part, optimizer in pairs
        if isinstance(optimizer, torch.optim.Optimizer)
    }
    return sorted(
        names | {_name(type(o)) for o in _others if id(o) not in inner and id(o) not in _replaced}
    )


def _note_optimizers() -> None:
    """Keeps every optimizer that a test builds, and counts steps."""
    from megatron_s3.mcore.build import MegatronOptimizer

    _after_init(MegatronOptimizer, lambda self: _parts.append(self))
    _after_init(torch.optim.Optimizer, lambda self: _others.append(self))

    def count(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        steps[_name(type(optimizer))] += 1

    sys.modules[torch.optim.Optimizer.__module__].register_optimizer_step_post_hook(count)


def _after_init(cls: type, action: Any) -> None:
    original = cls.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        action(self)

    cls.__init__ = __init__


def _replace_adam(name: str) -> None:
    """Makes ``OptimizerConfig(optimizer="adam")`` one of another optimizer's."""
    from megatron_s3.mcore import build

    config = importlib.import_module("megatron.core.optimizer").OptimizerConfig
    exchange = build._exchange

    def replace(self: Any) -> None:
        if self.optimizer == "adam":
            self.optimizer = name
            if name == "adam" and self.lr is None:
                self.lr = 1e-3  # torch's AdamW takes numbers alone, the others' None

    def exchange_and_init(part: Any, *args: Any) -> None:
        _replaced.add(id(part.optimizer))
        exchange(part, *args)
        # Or helpers that find no state put Adam's there, by name.
        part.optimizer.init_state()

    _after_init(config, replace)
    build._exchange = exchange_and_init


def _take_gloo_for_nccl() -> None:
    if torch.distributed.is_nccl_available() and not _on_cpu():
        return
    for name in ("init_process_group", "new_group"):
        original = getattr(torch.distributed, name)

        def start(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            args = tuple("gloo" if isinstance(a, str) and "nccl" in a else a for a in args)
            if "nccl" in str(kwargs.get("backend")):
                kwargs["backend"] = "gloo"
            kwargs.pop("device_id", None)
            return _original(*args, **kwargs)

        setattr(torch.distributed, name, start)
        setattr(torch.distributed.distributed_c10d, name, start)


def _take_local_layers() -> None:
    """Megatron's own layers for Transformer Engine's where it is missing: the same parameters."""
    specs = importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    if specs.HAVE_TE:
        return
    block, local = specs.get_gpt_decoder_block_spec, specs.get_gpt_layer_local_submodules
    known = inspect.signature(local).parameters

    def layer(*args: Any, **kwargs: Any) -> Any:
        return local(*args, **{name: value for name, value in kwargs.items() if name in known})

    def of_block(config: Any, use_transformer_engine: bool, *args: Any, **kwargs: Any) -> Any:
        return block(config, False, *args, **kwargs)

    specs.get_gpt_layer_with_transformer_engine_submodules = layer
    specs.get_gpt_decoder_block_spec = of_block
    accept_parts_of_a_sequence()


def _on_cpu() -> bool:
    from megatron_s3.mcore import cpu_device

    return cpu_device.active()


def _stay_offline() -> None:
    """Upstream's fixtures download data for other tests into /opt."""
    name = "tests.test_utils.python_scripts.download_unit_tests_dataset"
    module = types.ModuleType(name)
    module.download_and_extract_asset = lambda **kwargs: False
    sys.modules[name] = module


def _fill_states() -> None:
    """Random states, alike on all ranks, where upstream's helpers leave zeros.

    With zeros "saved equals loaded" would hold for an optimizer that loses its state, too.
    """
    utils = "tests.unit_tests.dist_checkpointing.utils"
    try:
        found = importlib.util.find_spec(utils) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        return
    module = importlib.import_module(utils)
    package = sys.modules[utils.rpartition(".")[0]]
    for name in ("setup_model_and_optimizer", "setup_moe_model_and_optimizer"):
        original = getattr(module, name)

        def setup(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            model, optimizer = _original(*args, **kwargs)
            _fill(optimizer, torch.Generator().manual_seed(next(_seeds)))
            return model, optimizer

        setattr(module, name, setup)
        setattr(package, name, setup)


@torch.no_grad()
def _fill(optimizer: Any, generator: torch.Generator) -> None:
    parts = getattr(optimizer, "chained_optimizers", None)
    if parts is not None:
        for part in parts:
            _fill(part, generator)
        return
    inner = getattr(optimizer, "optimizer", None)
    if not isinstance(inner, torch.optim.Optimizer):
        return
    for group in inner.param_groups:
        for param in group["params"]:
            for name, value in inner.state[param].items():
                if name != "master_param" and torch.is_tensor(value) and value.dim():
                    value = getattr(value, "_local_tensor", value)  # a DTensor's
                    value.copy_(torch.rand(value.shape, generator=generator, device="cpu"))
