"""The paper's rules for the settings of an AdamW run, by the names of Megatron's flags."""

from collections.abc import Iterator
from decimal import Decimal, InvalidOperation

__all__ = ["FLAGS", "LR_FACTOR", "OVER", "TIMES", "Rules", "number"]

#: S3's learning rate divided by AdamW's in the paper, for runs from the beginning. A checkpoint of
#: a running training is converted with another factor (megatron_s3.checkpoints.transfer).
LR_FACTOR = "10"

TIMES = ("--lr", "--min-lr", "--decoupled-lr", "--decoupled-min-lr", "--lr-warmup-init")
OVER = ("--weight-decay", "--start-weight-decay", "--end-weight-decay")
_DEFAULT_WEIGHT_DECAY = "0.01"  # Megatron's
_ADAMS = ("--adam-beta1", "--adam-beta2", "--adam-eps")

#: Megatron's flags that the rules know, and by which a launch is recognized; all have a value.
FLAGS = (*TIMES, *OVER, *_ADAMS, "--optimizer", "--clip-grad")


class Rules:
    """The paper's rules.

    Args:
        lr_factor: S3's learning rate divided by AdamW's, a decimal number.
        optimizer: the name of S3 in its description.
    """

    def __init__(self, lr_factor: str, optimizer: str) -> None:
        self.lr_factor, self.factor, self.optimizer = lr_factor, Decimal(lr_factor), optimizer

    def new(self, name: str, old: str) -> tuple[str | None, str]:
        """Returns a flag's new value (None to remove it) and the reason."""
        if name == "--optimizer":
            return self.optimizer, "S3 updates every parameter and is sharded like Adam"
        if name == "--clip-grad":
            return "0", "S3 needs no clipping, since no element of an update exceeds lr (Theorem 2)"
        if name in _ADAMS:
            return None, "a flag of AdamW; S3 has --s3-beta (0.95) and --s3-p (3), and no eps"
        if Decimal(old) == 0:
            return old, ""
        if name in TIMES:
            reason = f"multiplied by {self.lr_factor}, S3's learning rate divided by AdamW's"
            return number(old, self.factor), reason
        reason = f"divided by {self.lr_factor}, so that lr * weight_decay stays the same"
        return number(old, 1 / self.factor, self.factor), reason

    def missing(self, names: set[str]) -> Iterator[tuple[str, str, str]]:
        """Returns the flags that must be added to a launch: name, value and reason."""
        if "--optimizer" not in names:
            yield "--optimizer", self.optimizer, "Megatron's default is adam"
        if "--weight-decay" not in names and not {*OVER[1:]} <= names:
            new = number(_DEFAULT_WEIGHT_DECAY, 1 / self.factor, self.factor)
            why = "so that lr * weight_decay stays the same"
            default = f"Megatron's default {_DEFAULT_WEIGHT_DECAY} divided by {self.factor}, {why}"
            yield "--weight-decay", new, default


def number(old: str, factor: Decimal, over: Decimal | None = None) -> str:
    """Returns ``old`` times the factor or, exactly, over ``over``, in the same notation."""
    value = Decimal(old)
    if not value.is_finite():
        raise InvalidOperation(old)
    # A number with too many digits is given as the float that Megatron reads.
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
