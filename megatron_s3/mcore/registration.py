"""Makes the plugin's optimizers known to the installed Megatron-LM."""

import itertools
import os
import sys
from collections.abc import Sequence

from megatron_s3.mcore import cpu_device
from megatron_s3.mcore.arguments.flags import DEVICES

__all__ = ["DEVICE", "asked_device", "named_device", "register", "select_device"]

#: The environment variable that chooses the device if neither an argument nor a flag does.
DEVICE = "MEGATRON_S3_DEVICE"


def register(device: str | None = None) -> None:
    """Implements :func:`megatron_s3.register`."""
    select_device(device)
    from megatron_s3.mcore import seams  # imports Megatron

    seams.install()


def select_device(device: str | None = None) -> None:
    """Chooses the device, if this argument, ``--plugin-device`` or the environment names one.

    It comes before the import of Megatron, which uses torch.cuda before it parses arguments.
    """
    device = device or asked_device()
    if device is not None:
        cpu_device.select(device)


def asked_device() -> str | None:
    """Returns the device given by ``--plugin-device`` or the environment; None if neither is set.

    Raises:
        ValueError: the value of the environment variable is not auto, cuda or cpu.
    """
    asked = named_device(sys.argv[1:])
    if asked is None and (asked := os.environ.get(DEVICE) or None) not in (None, *DEVICES):
        raise ValueError(f"{DEVICE}={asked}: expected auto, cuda or cpu; change or unset it")
    return asked


def named_device(words: Sequence[str]) -> str | None:
    """Returns the device that ``--plugin-device`` names in a command line; None if it is absent."""
    named = None
    for flag, value in itertools.pairwise([*words, ""]):
        name, equals, own = flag.partition("=")
        value = own if equals else value
        # argparse checks the value later.
        if name in ("--plugin-device", "--s3-device") and value in DEVICES:
            named = value
    return named
