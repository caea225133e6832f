"""What a training run has printed."""

import math
import re
from dataclasses import dataclass

__all__ = ["Run"]


@dataclass(frozen=True)
class Run:
    """A training run that has ended.

    Attributes:
        returncode: the exit status.
        log: what all ranks printed.
    """

    returncode: int
    log: str

    def column(self, name: str) -> dict[int, str]:
        """Returns what the lines of the iterations print under a name, by iteration."""
        found = re.findall(rf"iteration +(\d+)/.*?{re.escape(name)}: +(\S+)", self.log)
        return {int(iteration): value for iteration, value in found}

    @property
    def losses(self) -> dict[int, str]:
        """Losses as printed (7 digits), by iteration; those that are finite.

        The second line after a start or a resume is left out: Megatron prints there the mean of
        the first two iterations.
        """
        finite = {i: x for i, x in self.column("lm loss").items() if math.isfinite(float(x))}
        return {i: loss for n, (i, loss) in enumerate(finite.items()) if n != 1}

    def losses_after(self, iteration: int) -> dict[int, str]:
        """Returns the losses after an iteration, but those that are a mean in a resume from it."""
        return {i: x for i, x in self.losses.items() if i > iteration and i != iteration + 2}

    @property
    def built(self) -> str:
        """The three lines that announce S3, without the package's name."""
        first = next(i for i, line in enumerate(self.said) if line.startswith("S3 (SoftSignSGD)"))
        return "\n".join(self.said[first : first + 3])

    @property
    def said(self) -> list[str]:
        """The lines of the plugin, without its name."""
        return re.findall(r"^\[megatron_s3\] (.*)", self.log, re.MULTILINE)

    @property
    def error(self) -> str:
        """The last line of the first traceback, or the line that refuses the arguments."""
        line = r"^(?:\[rank\d+\]: ?)?((?:[\w.]*(?:Error|Moved|Failed|Exception)|error): .*)"
        found = re.findall(line, self.log, re.MULTILINE)
        return next((error for error in found if "ChildFailedError" not in error), "")

    @property
    def loaded(self) -> int:
        """The iteration that it says it has loaded, 0 if none."""
        found = re.search(r"successfully loaded checkpoint .* at iteration (\d+)", self.log)
        return int(found[1]) if found else 0

    @property
    def trained(self) -> bool:
        """Whether a step was made."""
        return re.search(r"iteration +\d+/ +\d+ \|", self.log) is not None
