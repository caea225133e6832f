"""Reports of training runs: tables and pictures, and loss curves from TensorBoard files."""

from megatron_s3.report.curve import Run, Summary, draw, figure, read, summarize
from megatron_s3.report.errors import RunError

__all__ = ["Run", "RunError", "Summary", "draw", "figure", "read", "summarize"]
