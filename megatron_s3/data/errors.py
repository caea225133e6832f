"""What goes wrong on the way from text to a dataset."""


class DataError(ValueError):
    """The input cannot be made into a dataset; the message says what to do instead."""


class IncompleteError(RuntimeError):
    """The work stopped through no fault of the input; the same command goes on where it stopped."""
