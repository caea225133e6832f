"""Names of flags on the command line and in Megatron's arguments, and names of dtypes."""

import torch

from megatron_s3.optimizers.description import Description, Hyperparameter

__all__ = ["STATE_DTYPES", "destination", "dtype_name", "dtype_of", "flag", "flag_named"]

#: Destinations of the flags for the states' dtypes, in the order of an optimizer's states.
STATE_DTYPES = ("exp_avg_dtype", "exp_avg_sq_dtype")


#: Names of dtypes in Megatron's flags; its validation replaces the names by dtypes.
_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.uint8,
}


def flag(description: Description, hyperparameter: Hyperparameter) -> str:
    """Returns the command-line flag of an optimizer's hyperparameter, such as ``--s3-beta``."""
    negation = "no-" if hyperparameter.default is True else ""
    return f"--{description.name}-{negation}{hyperparameter.name}".replace("_", "-")


def destination(description: Description, hyperparameter: Hyperparameter) -> str:
    """Returns a hyperparameter's name in Megatron's arguments and configuration: ``s3_beta``."""
    return f"{description.name}_{hyperparameter.name}".replace("-", "_")


def flag_named(name: str) -> str:
    """Returns the flag of a destination."""
    return f"--{name.replace('_', '-')}"


def dtype_of(value: str | torch.dtype) -> torch.dtype:
    """Returns the dtype of that name in Megatron's flags; a dtype is returned unchanged."""
    # An unknown string is returned unchanged, so that the check that rejects it can print it.
    return _DTYPES.get(value, value)  # type: ignore[arg-type]


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of a dtype in Megatron's flags."""
    return next((name for name, value in _DTYPES.items() if value == dtype), str(dtype))
