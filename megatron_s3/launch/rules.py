"""The paper's rules for the flags of an AdamW launch."""

from collections.abc import Iterator
from decimal import Decimal, InvalidOperation

__all__ = ["OVER", "TIMES", "Rules", "number"]

TIMES = ("--lr", "--min-lr", "--decoupled-lr", "--decoupled-min-lr", "--lr-warmup-init")
OVER = ("--weight-decay", "--start-weight-decay", "--end-weight-decay")
_DEFAULT_WEIGHT_DECAY = "0.01"  # Megatron's
_ADAMS = ("--adam-beta1", "--adam-beta2", "--adam-eps")


class Rules:
    """The paper's rules.

    Args:
        lr_factor: S3's learning rate over AdamW's, a decimal number.
        optimizer: S3's name, as its description has it.
    """

    def __init__(self, lr_factor: str, optimizer: str) -> None:
        self.lr_factor, self.factor, self.optimizer = lr_factor, Decimal(lr_factor), optimizer

    def new(self, name: str, old: str) -> tuple[str | None, str]:
        """Returns a flag's new value (None: it goes), and why."""
        if name == "--optimizer":
            return self.optimizer, "S3 for every parameter, sharded as Adam is"
        if name == "--clip-grad":
            return "0", "S3 is not clipped: no element of its update exceeds lr, by Theorem 2"
        if name in _ADAMS:
            return None, "AdamW's; S3 has --s3-beta 0.95 and --s3-p 3 by default, and no eps"
        if Decimal(old) == 0:
            return old, ""
        if name in TIMES:
            reason = f"x {self.lr_factor}: the paper's rate for S3 over AdamW's"
            return number(old, self.factor), reason
        reason = f"/ {self.lr_factor}, so that lr * weight_decay stays as it was"
        return number(old, 1 / self.factor, self.factor), reason

    def missing(self, names: set[str]) -> Iterator[tuple[str, str, str]]:
        """Returns what a launch with these flags needs beside them: flag, value and why."""
        if "--optimizer" not in names:
            yield "--optimizer", self.optimizer, "Megatron's default is adam"
        if "--weight-decay" not in names and not {*OVER[1:]} <= names:
            new = number(_DEFAULT_WEIGHT_DECAY, 1 / self.factor, self.factor)
            why = "so that lr * weight_decay stays as it was"
            default = f"Megatron's default {_DEFAULT_WEIGHT_DECAY} / {self.factor}, {why}"
            yield "--weight-decay", new, default


def number(old: str, factor: Decimal, over: Decimal | None = None) -> str:
    """Multiplies ``old`` by the factor (or divides it by ``over``, exactly); written as it was."""
    value = Decimal(old)
    if not value.is_finite():
        raise InvalidOperation(old)
    # Through the number that Megatron reads, for what the division does not end with.
    new = value / over if over else value * factor
    new = new.normalize()
    if len(new.as_tuple().digits) > 17:
        return repr(float(new))
    if "e" not in old.lower():
        return f"{new:f}"
    digits = new.as_tuple().digits
    mantissa = str(digits[0]) + ("." + "".join(map(str, digits[1:])) if digits[1:] else "")
    sign = "-" if new < 0 else ""
    return f"{sign}{mantissa}e{new.adjusted()}"
