"""All tables of a report."""

from collections.abc import Sequence

from megatron_s3.report import compare, course, equal_steps, margins, provoked, settings
from megatron_s3.report.compare import Table
from megatron_s3.report.runs import Suite

__all__ = ["tables"]


def tables(suites: Sequence[Suite], peak_tflops: float | None = None) -> list[Table]:
    """Returns the tables that have rows, in the order of the page.

    Args:
        suites: the runs.
        peak_tflops: peak of one device in the precision of the training, for the MFU.
    """
    found: list[Table | None] = []
    for suite in suites:
        found += [compare.final(suite, name, runs) for name, runs in suite.compared.items()]
        found += [*provoked.tables(suite), course.spikes(suite), course.speed(suite, peak_tflops)]
    found += [*equal_steps.tables(suites), course.running(suites)]
    found += [*margins.tables(suites), *settings.tables(suites)]
    return [table for table in found if table and table.rows]
