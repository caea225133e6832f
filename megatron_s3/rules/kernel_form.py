"""The parameters of a rule's fused kernels: one definition for Python, C++ and Triton.

A rule that has kernels carries a :class:`KernelForm` (:func:`with_kernel`): the names of the
numbers and flags that its kernels take, and a function that computes them from the rule's
hyperparameters.  Python packs them by name.  The C++ source includes a struct with the same names
(:func:`cpp_declarations`).  The Triton source reads the same places (:meth:`KernelForm.flag`), and
a test compares the names.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

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

#: A key that the function of numbers may add: why a variant is not exact, see :class:`Form`.
INEXACT = "inexact"
#: The most states for which a row of the kernels' tables has room.
MOST_STATES = 4
_PLAIN = {int, float, bool, type(None)}


@dataclass(frozen=True, slots=True)
class Form:
    """The kernel parameters of a rule with certain hyperparameters.

    Attributes:
        kernel: the definition of the parameters.
        scalars: the float32 numbers, in the order of the definition.
        variant: the flags, packed by the definition; the kernels are compiled for each variant.
        inexact: set if the variant has no exact sequence of single operations, so that not every
            kernel has it: a text that names the exact variants and this one.
    """

    kernel: "KernelForm"
    scalars: tuple[float, ...]
    variant: int = 0
    inexact: str | None = None


@dataclass(frozen=True, eq=False)
class KernelForm:
    """The definition of the parameters of a rule's fused kernels.

    Attributes:
        name: the name of the rule's functions in the kernels' sources.
        states: the number of the rule's state tensors, at most 4.
        scalars: the names of the float32 numbers that the kernels read at each step.
        numbers: returns the scalars and flags by name, from the rule's hyperparameters (keyword
            arguments).  It computes in double precision, as the rule does; a kernel gets the
            numbers rounded to float32, as torch rounds the numbers in a rule's operations.  It may
            add ``inexact``, see :class:`Form`.
        flags: the names and widths in bits of the flags that are compiled in.
        cpp: the C++ source of another package's rule: a struct and ``rule_NAME``, as in
            :file:`rules.h` of the CPU kernel; None for the plugin's rules, and for a rule without
            a CPU kernel.
        triton: ``module:function`` of another package's rule; None likewise.
    """

    name: str
    states: int
    scalars: Sequence[str]
    numbers: Callable[..., Mapping[str, Any]]
    flags: Mapping[str, int] = field(default_factory=dict)
    cpp: str | None = None
    triton: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.states <= MOST_STATES:
            raise ValueError(
                f"the kernel {self.name} has {self.states} states, and kernels take 1 to "
                f"{MOST_STATES}; leave the rule without one, and torch operations step it"
            )

    @property
    def own(self) -> bool:
        """Returns whether the rule is in the sources of the plugin's kernels."""
        return self.cpp is None and self.triton is None

    def flag(self, name: str) -> tuple[int, int]:
        """Returns the first bit of a flag in :attr:`Form.variant`, and its mask."""
        at = 0
        for each, bits in self.flags.items():
            if each == name:
                return at, (1 << bits) - 1
            at += bits
        raise KeyError(name)

    def unknown(self, rule: Callable[..., Any], hyperparameters: Mapping[str, object]) -> list[str]:
        """Returns the hyperparameters that the kernels lack and that differ from their defaults."""
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
        """Returns the form of a rule with these hyperparameters, without unknown ones."""
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
                raise ValueError(f"{self.name}: flag {name} must be in [0, {mask}], not {value}")
            variant |= value << at
        if values:
            raise ValueError(
                f"{self.name}: {', '.join(values)} is neither a scalar nor a flag of the form"
            )
        return Form(self, scalars, variant, inexact)


@functools.cache
def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def with_kernel(kernel: KernelForm) -> Callable[[Rule], Rule]:
    """Returns a decorator that gives a rule the definition of its kernels' parameters."""

    def decorate(rule: Rule) -> Rule:
        setattr(rule, "kernel", kernel)  # noqa: B010 (functions have no such field of their own)
        return rule

    return decorate


def kernel_of(rule: Callable[..., Any]) -> KernelForm:
    """Returns the definition of a rule's kernel parameters.

    Raises:
        AttributeError: the rule has no kernels.
    """
    kernel: KernelForm = rule.kernel  # type: ignore[attr-defined]
    return kernel


def form(
    rule: Callable[..., Any],
    hyperparameters: Mapping[str, object],
    source: Literal["cpp", "triton"] | None = None,
) -> Form | str:
    """Returns the kernel parameters of a rule, or the name of what the kernels lack.

    Args:
        rule: see :mod:`megatron_s3.rules`.
        hyperparameters: the rule's keyword arguments.
        source: the attribute of :class:`KernelForm` with the source of the kernel; None for any.
    """
    kernel: KernelForm | None = getattr(rule, "kernel", None)
    if kernel is None:
        return name_of(rule)
    if source is not None and not kernel.own and getattr(kernel, source) is None:
        return kernel.name
    # Most steps have the numbers of the step before; what is not a plain number may change.
    made = _form if _PLAIN.issuperset(map(type, hyperparameters.values())) else _form.__wrapped__
    return made(rule, kernel, tuple(hyperparameters.items()))


@functools.lru_cache(maxsize=256)
def _form(
    rule: Callable[..., Any], kernel: KernelForm, values: tuple[tuple[str, object], ...]
) -> Form | str:
    hyperparameters = dict(values)
    if unknown := kernel.unknown(rule, hyperparameters):
        return f"the option {' and '.join(unknown)} of {name_of(rule)}"
    return kernel.pack(hyperparameters)


def name_of(rule: Callable[..., Any]) -> str:
    """Returns the name of a rule in messages."""
    return getattr(rule, "__name__", repr(rule))


def cpp_declarations(kernel: KernelForm) -> str:
    """Returns the C++ declarations of a rule's numbers and flags."""
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
