"""Prints bytes an element that optimizers keep, and that one step moves.

    python -m scripts.bench.state_bytes

The optimizers are made for one bfloat16 parameter and step once, on the CPU; what they then hold is
counted (without gradients).  torchao, bitsandbytes and flashoptim are measured if they can be
imported; they are no dependency of the project.  Megatron's AdamW and Transformer Engine's Adam
are counted from their documentation.  Traffic is counted: every tensor is read and written once by
the step, gradients are bfloat16 unless a row says otherwise.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_s3 import S3
from tests.harness.tables import columns

__all__ = ["main", "measured"]

COUNT = 1 << 20
SMALL = {"exp_avg": torch.int8, "exp_pnorm": torch.bfloat16}
#: Rows of S3: options, whether main parameters are remainders, and the traffic.
OURS: dict[str, tuple[dict[str, Any], bool, float]] = {
    "S3, fp32 states": ({}, False, 28),
    "S3, fp32 states, remainders": ({}, True, 26),
    "S3, bf16 states, remainders": ({"state_dtype": torch.bfloat16}, True, 18),
    "S3, int8 and bf16 states, remainders": ({"state_dtype": SMALL}, True, 16),
}
#: Rows from documentation: bytes and traffic.
COUNTED = {
    "AdamW in Megatron, fp32 gradients, clipped": (14, 46),
    "Transformer Engine's Adam, bf16 states, remainders, clipped": (8, 20),
}
#: Rows of other packages: how to make the optimizer.  Their parameters have no fp32 copy but
#: flashoptim's, which adds a correction of 8 bits to each.
OTHERS: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "torchao AdamW8bit, bf16 parameters": (
        "torchao.optim",
        lambda module, params: module.AdamW8bit(params, bf16_stochastic_round=True),
    ),
    "bitsandbytes AdamW8bit, bf16 parameters": (
        "bitsandbytes.optim",
        lambda module, params: module.AdamW8bit(params),
    ),
    "flashoptim FlashAdamW, bf16 parameters, 24 bits": (
        "flashoptim",
        lambda module, params: module.FlashAdamW(params, master_weight_bits=24),
    ),
}


def main() -> None:
    """Prints the table."""
    rows = [("optimizer", "bytes", "traffic", "")]
    rows += [(name, f"{a:g}", f"{b:g}", "counted") for name, (a, b) in COUNTED.items()]
    for name, (options, remainders, traffic) in OURS.items():
        rows.append((name, f"{measured(_s3(options, remainders)):g}", f"{traffic:g}", "measured"))
    for name, (module, make) in OTHERS.items():
        try:
            found = importlib.import_module(module)
            rows.append(
                (name, f"{measured(lambda p, m=make, f=found: m(f, p)):.2f}", "", "measured")
            )
        except Exception as error:  # each package has requirements of its own
            why = str(error).strip().splitlines() or [""]
            rows.append((name, "", "", f"not here: {type(error).__name__} {why[0][:60]}"))
    print(columns(rows, right=(1, 2)))


def _s3(options: dict[str, Any], remainders: bool) -> Callable[[list[Tensor]], S3]:
    def make(params: list[Tensor]) -> S3:
        optimizer = S3(params, **options)
        optimizer.host.master_params, optimizer.host.remainders = True, remainders
        return optimizer

    return make


def measured(make: Callable[[list[Any]], Any]) -> float:
    """Returns bytes an element of a parameter and its state after a step.

    Args:
        make: makes the optimizer of a list of parameters.
    """
    param = torch.nn.Parameter(torch.randn(COUNT).bfloat16())
    optimizer = make([param])
    param.grad = torch.randn(COUNT).bfloat16()
    optimizer.step()
    return (param.nbytes + sum(map(_bytes, optimizer.state[param].values()))) / COUNT


def _bytes(value: Any) -> int:
    """Returns the bytes of a tensor, with those inside a tensor that consists of others."""
    if not isinstance(value, Tensor) or not value.dim():
        return 0
    names = getattr(value, "tensor_attrs", None) or getattr(value, "__tensor_flatten__", None)
    if callable(names):
        names = names()[0]
    return sum(getattr(value, name).nbytes for name in names) if names else value.nbytes


if __name__ == "__main__":
    main()
