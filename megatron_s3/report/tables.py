"""All tables of a report."""

from collections.abc import Sequence

from megatron_s3.report import compare, margins, settings
from megatron_s3.report.compare import Table
from megatron_s3.report.runs import Suite

__all__ = ["tables"]


def tables(suites: Sequence[Suite], peak_tflops: float | None = None) -> list[Table]:
    """Returns the tables in the order of the page.

    Args:
        suites: the runs.
        peak_tflops: peak of one device in the precision of the training, for the MFU.
    """
    found = compare.tables(suites, peak_tflops)
    return [*found, *margins.tables(suites), *settings.tables(suites)]
