"""The numbers and flags that a fused kernel is given of a rule: one definition for all sources.

A rule that has kernels carries a :class:`KernelForm` (:func:`with_kernel`): the names of the
numbers and of the flags that its kernels take, and a function that makes them from the rule's
hyperparameters.  Python packs them by name; the C++ source is given a struct with the same names
(:func:`cpp_declarations`); the Triton source reads the same places (:meth:`KernelForm.flag`), and a
test compares the names.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

__all__ = [
    "Form",
    "KernelForm",
    "cpp_declarations",
    "form",
    "kernel_of",
    "name_of",
    "with_kernel",
]

Rule = TypeVar("Rule", bound=Callable[..., Any])

#: What the function of numbers may add: why a variant is not exact, see :class:`Form`.
INEXACT = "inexact"


@dataclass(frozen=True, slots=True)
class Form:
    """A rule with its hyperparameters, as a kernel takes it.

    Attributes:
        kernel: the definition that this follows.
        scalars: float32 numbers, in the order of the definition.
        variant: the flags, packed as the definition says; a variant is compiled for each.
        inexact: set where the variant has no exact sequence of single operations, so that not
            every kernel has it: what the exact ones are, and that this is none.
    """

    kernel: "KernelForm"
    scalars: tuple[float, ...]
    variant: int = 0
    inexact: str | None = None

    @property
    def name(self) -> str:
        """Returns the name of the rule's function in the kernels' sources."""
        return self.kernel.name

    @property
    def states(self) -> int:
        """Returns the number of the rule's state tensors."""
        return self.kernel.states


@dataclass(frozen=True, eq=False)
class KernelForm:
    """The definition of what a rule's fused kernels take.

    Attributes:
        name: of the rule's functions in the kernels' sources.
        states: number of the rule's state tensors, at most 4.
        scalars: names of the float32 numbers that the kernels read at each step.
        numbers: returns the scalars and flags by name, from the rule's hyperparameters (keyword
            arguments).  It derives numbers as the rule does, in double precision: a kernel gets
            them rounded to float32, as torch rounds the numbers of a rule's operations.  It may
            add ``inexact``, see :class:`Form`.
        flags: names and widths in bits of what is compiled in.
        cpp: C++ source of a rule that is not the plugin's own: a struct and ``rule_NAME``, as
            in :file:`rules.h` beside the CPU's kernel; None for the plugin's rules, and where
            there is no kernel for the CPU.
        triton: ``module:function`` of a rule that is not the plugin's own; None likewise.
    """

    name: str
    states: int
    scalars: Sequence[str]
    numbers: Callable[..., Mapping[str, Any]]
    flags: Mapping[str, int] = field(default_factory=dict)
    cpp: str | None = None
    triton: str | None = None

    @property
    def own(self) -> bool:
        """Returns whether the sources of the plugin's kernels hold the rule."""
        return self.cpp is None and self.triton is None

    def flag(self, name: str) -> tuple[int, int]:
        """Returns where a flag lies in :attr:`Form.variant`: its first bit, and its mask."""
        at = 0
        for each, bits in self.flags.items():
            if each == name:
                return at, (1 << bits) - 1
            at += bits
        raise KeyError(name)

    def unknown(self, rule: Callable[..., Any], hyperparameters: Mapping[str, object]) -> list[str]:
        """Returns the hyperparameters that kernels do not know, and whose value asks for something.

        A rule's own default of a hyperparameter asks for nothing.
        """
        known = _parameters(self.numbers)
        if hyperparameters.keys() <= known.keys():
            return []
        defaults = _parameters(rule)
        return [
            name
            for name, value in hyperparameters.items()
            if name not in known
            and (name not in defaults or defaults[name].default is inspect.Parameter.empty
                 or defaults[name].default != value)
        ]  # fmt: skip

    def pack(self, hyperparameters: Mapping[str, object]) -> Form:
        """Returns the form of a rule with these hyperparameters; what is unknown is left out."""
        known = _parameters(self.numbers)
        given = {name: value for name, value in hyperparameters.items() if name in known}
        values = dict(self.numbers(**given))
        inexact = values.pop(INEXACT, None)
        scalars = tuple(float(values.pop(name)) for name in self.scalars)
        variant = 0
        for name in self.flags:
            at, mask = self.flag(name)
            value = int(values.pop(name))
            if not 0 <= value <= mask:
                raise ValueError(f"{self.name}: the flag {name} has room for {mask}, not {value}")
            variant |= value << at
        if values:
            raise ValueError(f"{self.name}: no kernel takes {', '.join(values)}")
        return Form(self, scalars, variant, inexact)


@functools.cache
def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def with_kernel(kernel: KernelForm) -> Callable[[Rule], Rule]:
    """Returns a decorator that gives a rule the definition of what its kernels take."""

    def decorate(rule: Rule) -> Rule:
        setattr(rule, "kernel", kernel)  # noqa: B010 (functions have no such field of their own)
        return rule

    return decorate


def kernel_of(rule: Callable[..., Any]) -> KernelForm:
    """Returns the definition that a rule carries.

    Raises:
        AttributeError: it carries none.
    """
    kernel: KernelForm = rule.kernel  # type: ignore[attr-defined]
    return kernel


def form(rule: Callable[..., Any], hyperparameters: Mapping[str, object]) -> Form | str:
    """Returns what a kernel is given of a rule, or what kernels lack: the rule, or its option.

    Args:
        rule: see :mod:`megatron_s3.rules`.
        hyperparameters: the rule's keyword arguments.
    """
    kernel: KernelForm | None = getattr(rule, "kernel", None)
    if kernel is None:
        return name_of(rule)
    if unknown := kernel.unknown(rule, hyperparameters):
        return f"the option {' and '.join(unknown)} of {name_of(rule)}"
    return kernel.pack(hyperparameters)


def name_of(rule: Callable[..., Any]) -> str:
    """Returns what a message calls a rule."""
    return getattr(rule, "__name__", repr(rule))


def cpp_declarations(kernel: KernelForm) -> str:
    """Returns the C++ declarations of a rule's numbers and flags, by their names."""
    title = "".join(word.capitalize() for word in kernel.name.split("_"))
    fields = f"  float {', '.join(kernel.scalars)};\n" if kernel.scalars else ""
    lines = [f"struct {title}Scalars : Rates {{\n{fields}}};"]
    for name in kernel.flags:
        at, mask = kernel.flag(name)
        lines.append(
            f"inline int {kernel.name}_{name}(int64_t variant) "
            f"{{ return int(variant >> {at} & {mask}); }}"
        )
    return "\n".join(lines) + "\n"
