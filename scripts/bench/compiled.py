"""Prints figures of the Triton kernel's machine code: `python -m scripts.bench.compiled`.

For each architecture and combination of dtypes the table contains registers, stack, spills, and the
widths of memory accesses.  The command needs no GPU.
"""

import argparse
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_s3.optimizers import OPTIMIZERS
from megatron_s3.rules.kernel_form import Form, form
from megatron_s3.rules.s3 import s3_update

__all__ = ["CAPABILITIES", "VARIANTS", "Compiled", "Variant", "compile_kernel", "main"]

#: Compute capabilities of Ampere, Hopper and Blackwell.
CAPABILITIES = (80, 90, 100)


@dataclass(frozen=True)
class Variant:
    """A kernel to compile.

    Attributes:
        form: the update rule and its hyperparameters.
        grad: dtype of the gradient.
        state: a key of :data:`_STATES`.
        model: dtype of the model parameter; None if there is none.
        param: dtype of the main parameter, which is int16 for remainders.
        statistics: whether the kernel computes statistics of the updates.
    """

    form: Form
    grad: str = "fp32"
    state: str = "fp32"
    model: str | None = "bf16"
    statistics: bool = False
    param: str = "fp32"


#: Dtypes of the states of a rule, which has at most four.
_STATES = {
    "fp32": (torch.float32,) * 4,
    "bf16": (torch.bfloat16,) * 4,
    "int8 and bf16": (torch.int8, torch.bfloat16),
}


def _s3(p: float = 3, **hyperparameters: object) -> Form:
    return form(s3_update, {"beta": 0.95, "p": p} | hyperparameters)


def _default(name: str) -> Form:
    """Returns the form of an optimizer's first step."""
    optimizer = OPTIMIZERS[name]([torch.zeros(1)])
    (group,) = optimizer.param_groups
    values = optimizer.group_hyperparameters(group | {"step": 1})
    return form(optimizer.description.rule, values)


VARIANTS = {
    "fp32": Variant(_s3()),
    "fp32, no model parameter": Variant(_s3(), model=None),
    "bf16 gradient": Variant(_s3(), grad="bf16"),
    "bf16 states": Variant(_s3(), state="bf16"),
    "bf16 gradient and states": Variant(_s3(), grad="bf16", state="bf16"),
    "fp32, statistics": Variant(_s3(), statistics=True),
    "bf16 gradient, statistics": Variant(_s3(), grad="bf16", statistics=True),
    "bf16 states, statistics": Variant(_s3(), state="bf16", statistics=True),
    "bf16 both, statistics": Variant(_s3(), grad="bf16", state="bf16", statistics=True),
    "int8 state": Variant(_s3(), grad="bf16", state="int8 and bf16"),
    "int8 state, remainders": Variant(_s3(), "bf16", "int8 and bf16", param="int16"),
    "the same, statistics": Variant(_s3(), "bf16", "int8 and bf16", "bf16", True, "int16"),
    "bounded, statistics": Variant(_s3(grad_bound=10.0), statistics=True),
    "fp32, bounded gradients": Variant(_s3(grad_bound=10.0)),
    "cautious, statistics": Variant(_s3(cautious=True), statistics=True),
    "fp32, cautious": Variant(_s3(cautious=True)),
    "fp32, p=2": Variant(_s3(2)),
    "fp32, p=1": Variant(_s3(1)),
    "fp32, any p": Variant(_s3(2.5)),
}
VARIANTS |= {name: Variant(_default(name)) for name in OPTIMIZERS if name != "s3"}


@dataclass(frozen=True)
class Compiled:
    """Figures of a kernel's machine code.

    Attributes:
        registers: registers per thread.
        stack: bytes of stack per thread.
        spills: number of loads and stores of local memory.
        shared: bytes of shared memory of a program.
        loads: number of loads from global memory by width in bits.
        copies: number of copies from global to shared memory by width in bits.
        stores: number of stores to global memory by width in bits.
        fused: number of fused multiply-adds on float32.
        instructions: number of all instructions.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    loads: dict[int, int]
    copies: dict[int, int]
    stores: dict[int, int]
    fused: int
    instructions: int


def compile_kernel(variant: str, capability: int) -> Compiled:
    """Compiles one of :data:`VARIANTS` for a compute capability, such as 90.

    Raises:
        ModuleNotFoundError: triton is not installed.
    """
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_s3.kernels.gpu import kernel as gpu_kernel
    from megatron_s3.kernels.gpu import rules as gpu_rules

    types = {"fp32": tl.float32, "bf16": tl.bfloat16, "int16": tl.int16, None: tl.float32}
    chosen = VARIANTS[variant]
    states = chosen.form.kernel.states
    kernel = gpu_kernel.step_kernel
    stored = _STATES[chosen.state][:states]
    groups = 2  # with weight decay and without it
    constants = {
        "GROUPS": groups,
        "RULE": getattr(gpu_rules, chosen.form.kernel.name),
        "VARIANT": chosen.form.variant,
        "STATES": states,
        "STORED": gpu_kernel.stored(stored),
        "PARAM": types[chosen.param],
        "GRAD": types[chosen.grad],
        "MODEL": types[chosen.model],
        "HAS_MODEL": chosen.model is not None,
        "RATES_ON_DEVICE": False,
        "STATISTICS": chosen.statistics,
        "CHUNK": gpu_kernel.CHUNK,
        "BLOCK": gpu_kernel.BLOCK,
    }
    pointers = {"table": "*i64", "chunks": "*i32", "rates": "*fp32", "partials": "*fp64"}
    types_of = pointers | dict.fromkeys(constants, "constexpr")
    types_of["host_rates"] = ("fp32",) * ((3 if torch.int8 in stored else 2) * groups)
    types_of["scalars"] = ("fp32",) * len(chosen.form.scalars)
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: types_of.get(name, "fp32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    binary = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options=gpu_kernel.launch_options(
            chosen.form, statistics=chosen.statistics, fractions=torch.int8 in stored
        ),
    )
    return _read(
        binary.asm["cubin"],
        binary.metadata.shared,
        Path(triton.__file__).parent / "backends/nvidia/bin",
    )


def _read(cubin: bytes, shared: int, tools: Path) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = _output(tools / "nvdisasm", file.name)
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+)\s+STACK:(\d+)", usage).groups())
    return Compiled(
        registers,
        stack,
        len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared,
        _widths("LDG", code),
        _widths("LDGSTS", code),
        _widths("STG", code),
        len(re.findall(r"\bFFMA\b", code)),
        len(re.findall(r"/\*[0-9a-f]{4,5}\*/[^\n]*;", code)),
    )


def _widths(name: str, code: str) -> dict[int, int]:
    """Returns the number of instructions of that name by the bits that each accesses."""
    widths: dict[int, int] = {}
    for kind in re.findall(rf"\b{name}\.E((?:\.\w+)*)", code):
        sizes = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
        found = [sizes[word] for word in kind.split(".") if word in sizes]
        width = found[0] if found else 32
        widths[width] = widths.get(width, 0) + 1
    return dict(sorted(widths.items(), reverse=True))


def _output(tool: Path, *words: str) -> str:
    run = subprocess.run([tool, *words], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, nargs="+", default=list(CAPABILITIES))
    args = parser.parse_args()
    print(
        f"{'':26s} {'':>6s} {'registers':>9s} {'stack':>5s} {'spills':>6s} {'shared':>6s} "
        f"{'FFMA':>4s} {'code':>5s}  loads; copies; stores (bits x instructions)"
    )
    for variant in VARIANTS:
        for capability in args.capability:
            c = compile_kernel(variant, capability)
            print(
                f"{variant:26s} sm_{capability:<3d} {c.registers:9d} {c.stack:5d} {c.spills:6d} "
                f"{c.shared:6d} {c.fused:4d} {c.instructions:5d}  "
                f"{'; '.join(map(_text, (c.loads, c.copies, c.stores)))}",
                flush=True,
            )


def _text(widths: dict[int, int]) -> str:
    return ", ".join(f"{width} x {count}" for width, count in widths.items()) or "none"


if __name__ == "__main__":
    main()
