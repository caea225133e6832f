"""Choice of the kernel for each parameter: the fused one if possible, else torch operations."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from megatron_s3.kernels import portable
from megatron_s3.kernels.operands import Operands, fault
from megatron_s3.rules.kernel_form import form

__all__ = ["KERNELS", "Choice", "choose", "path"]

#: The modules with fused kernels by device type; they are imported when they are needed.
KERNELS = {"cpu": "megatron_s3.kernels.cpu", "cuda": "megatron_s3.kernels.gpu"}


@dataclass(frozen=True)
class Choice:
    """A kernel and the parameters that one call of it updates.

    Attributes:
        kernel: a module of :mod:`megatron_s3.kernels`.
        indices: the indices of the operands.
        reason: why the kernel is the PyTorch implementation; None for a fused kernel.
    """

    kernel: ModuleType
    indices: Sequence[int]
    reason: str | None = None


def choose(
    rule: Callable[..., Tensor],
    operands: Sequence[Operands],
    hyperparameters: Mapping[str, object],
    label: str,
    fused: bool | None,
) -> list[Choice]:
    """Returns the calls of kernels that make a step: fused kernels wherever they are possible.

    Args:
        rule: see :mod:`megatron_s3.rules`.
        operands: the operands of the step.
        hyperparameters: the rule's hyperparameters.
        label: the name of the optimizer in messages.
        fused: False selects torch operations for all parameters.

    Raises:
        RuntimeError: the memory of a tensor was freed, or ``fused`` is True and no fused kernel can
            take some of the parameters.
    """
    if not operands:
        return []
    choices: list[Choice] = []
    if fused is False:
        choices.append(Choice(portable, range(len(operands)), "fused=False"))
    else:
        for device in dict.fromkeys(o.param.device for o in operands):
            mine = [i for i, o in enumerate(operands) if o.param.device == device]
            choices += _on_device(device.type, rule, operands, mine, hyperparameters, label)
    for choice in choices:
        if choice.reason is not None:
            _check_memory([operands[i] for i in choice.indices], label)
            if fused:
                raise RuntimeError(f"fused=True, but {choice.reason}. No parameter was changed.")
    return choices


def _on_device(
    device: str,
    rule: Callable[..., Tensor],
    operands: Sequence[Operands],
    mine: list[int],
    hyperparameters: Mapping[str, object],
    label: str,
) -> list[Choice]:
    if device not in KERNELS:
        return [Choice(portable, mine, f"no kernel for {label} on {device}")]
    kernel = importlib.import_module(KERNELS[device])

    def reason(indices: Sequence[int]) -> str | None:
        found: str | None = kernel.reason(rule, [operands[i] for i in indices], **hyperparameters)
        return found

    if reason(mine) is None:
        return [Choice(kernel, mine)]
    if (why := reason([])) is not None:  # for any tensors
        return [Choice(portable, mine, why)]
    # Some parameters need torch operations.
    given = form(rule, hyperparameters)
    assert not isinstance(given, str), "the kernel would have refused it"
    faults: dict[str | None, list[int]] = {}
    for i in mine:
        faults.setdefault(fault([operands[i]], device, given.kernel.states), []).append(i)
    choices = []
    if good := faults.pop(None, None):
        why = reason(good)
        choices.append(Choice(kernel if why is None else portable, good, why))
    return choices + [
        Choice(portable, indices, f"the {kernel.NAME} cannot take {found}")
        for found, indices in faults.items()
    ]


def _check_memory(operands: Sequence[Operands], label: str) -> None:
    """Raises RuntimeError if a tensor's memory was freed, which would crash torch's operations."""
    for o in operands:
        if not o.written[0] or (o.read[0] and o.written[1::2].count(0) == (o.model_param is None)):
            continue
        names = ("parameter", "gradient", "state", "copy in the model")
        tensors = ((o.param,), (o.grad,), o.state, (o.model_param,))
        for name, some in zip(names, tensors, strict=True):
            for tensor in some:
                if type(tensor) is not Tensor or tensor.is_neg():
                    continue
                if tensor.device.type != "meta" and tensor.untyped_storage().nbytes() == 0:
                    raise RuntimeError(
                        f"{label}: the memory of a parameter's {name} was freed (its storage has "
                        f"0 bytes for {tensor.numel()} elements). No parameter was changed. Step "
                        "before it is freed, or after it is filled again."
                    )


def path(choices: Sequence[Choice], operands: Sequence[Sequence[Operands]]) -> str:
    """Returns a text that names a step's kernels, and where and why it used torch operations.

    Args:
        choices: the choices of all calls of the step.
        operands: the operands of each call.
    """
    names = list(dict.fromkeys(c.kernel.NAME for c in choices if c.reason is None))
    reasons: dict[str, list[Operands]] = {}
    for choice, its in zip(choices, operands, strict=True):
        if choice.reason is not None:
            reasons.setdefault(choice.reason, []).extend(its)
    if not names:
        return "portable: " + "; ".join(reasons) if reasons else ""
    total = sum(map(len, operands))
    parts = [
        f"portable for {len(some)} of {total} parameters, the first of "
        f"{some[0].param.numel():,} elements: {reason}"
        for reason, some in reasons.items()
    ]
    return "; ".join([" and ".join(names), *parts])
