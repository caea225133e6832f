"""Training runs to figures and pictures, read from Megatron's TensorBoard files."""

from megatron_s3.report.curve import Run, RunError, Summary, draw, figure, read, summarize

__all__ = ["Run", "RunError", "Summary", "draw", "figure", "read", "summarize"]
