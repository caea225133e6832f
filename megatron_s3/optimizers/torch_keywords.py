"""Translates the keywords of torch.optim's constructors into those of the plugin's optimizers."""

from collections.abc import Mapping
from typing import Any

from megatron_s3.optimizers.description import Description

__all__ = ["translated"]

#: Keywords of torch.optim.AdamW, values without an effect, and why others are rejected.
_NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "foreach": ((None, False), "all tensors are updated together anyway"),
    "maximize": ((False,), "it minimizes; negate the loss"),
    "amsgrad": ((False,), "it keeps no maximum of its averages"),
    "capturable": ((False,), "a CUDA graph needs no keyword; give lr as a tensor"),
    "differentiable": ((False,), "autograd does not go through its step"),
    "decoupled_weight_decay": ((True,), "its weight decay is always decoupled"),
}


def translated(description: Description, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keywords of a constructor or param group as keywords of the optimizer.

    Programs written for torch.optim.AdamW pass ``foreach=None``, ``maximize=False`` and similar
    keywords, which this function drops.  It converts ``betas`` to the optimizer's coefficients, and
    drops an ``eps`` of 0 if the optimizer has no ``eps``.

    Args:
        description: the description of the optimizer.
        given: the keywords with their values.

    Raises:
        ValueError: the optimizer does not support a keyword, or the number of ``betas`` does not
            match its coefficients.
    """
    names = [h.name for h in description.hyperparameters]
    result = dict(given)
    for name, (neutral, reason) in _NEUTRAL.items():
        if name in result and name not in names:
            value = result.pop(name)
            if not any(value is allowed for allowed in neutral):
                raise ValueError(
                    f"{description.label} does not support {name}={value!r}: {reason}. Leave it out"
                )
    if "eps" in result and "eps" not in names and (eps := result.pop("eps")) not in (None, 0):
        raise ValueError(
            f"{description.label} has no eps, which {eps!r} would set: nothing is added to its "
            "denominator. Leave it out"
        )
    if "betas" in result:
        result |= _coefficients(description, names, result.pop("betas"), result)
    return result


def _coefficients(
    description: Description, names: list[str], betas: Any, others: Mapping[str, Any]
) -> dict[str, Any]:
    own = [name for name in names if name.startswith("beta") and name[4:].isdigit()]
    label = description.label
    if "beta" in names:
        own = ["beta"]
    elif not own:
        raise ValueError(f"{label} has no betas, which {betas!r} would set. Leave it out")
    values = list(betas) if isinstance(betas, tuple | list) else [betas]
    if twice := [name for name in own if name in others]:
        names_twice = ", ".join(twice)
        raise ValueError(f"{label}: betas={betas!r} and {names_twice} set the same. Leave one out")
    if own == ["beta"]:
        if not values or any(value != values[0] for value in values):
            raise ValueError(
                f"{label} has one coefficient, and betas={betas!r} are not equal numbers. Give beta"
                + (", and the denominator's coefficient as beta2" if "beta2" in names else "")
            )
        return {"beta": values[0]}
    if len(values) != len(own):
        raise ValueError(f"{label} has {', '.join(own)}, and betas={betas!r} holds {len(values)}")
    return dict(zip(own, values, strict=True))
