"""Why a checkpoint cannot be converted or exported."""

__all__ = ["ConvertError", "Mismatch", "TransferError"]


class ConvertError(ValueError):
    """The conversion cannot be made; the message names the file, the reason and what to do."""


class TransferError(ValueError):
    """The state or the arguments cannot be handed over; the message says why, and what to do."""


class Mismatch(RuntimeError):
    """What was written is not, or does not compute, what it should."""
