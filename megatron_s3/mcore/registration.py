"""Makes the plugin's optimizers known to the installed Megatron-LM."""

import itertools
import os
import sys

from megatron_s3.mcore import cpu_device
from megatron_s3.mcore.arguments import DEVICES

__all__ = ["DEVICE", "asked_device", "register"]

#: The environment variable that chooses the device if neither an argument nor a flag does.
DEVICE = "MEGATRON_S3_DEVICE"


def register(device: str | None = None) -> None:
    """Implements :func:`megatron_s3.register`.

    The device is chosen first, because Megatron uses torch.cuda while it is imported, before it
    parses arguments.
    """
    device = device or asked_device()
    if device is not None:
        cpu_device.select(device)
    from megatron_s3.mcore import seams  # imports Megatron

    seams.install()


def asked_device() -> str | None:
    """Returns the device given by ``--plugin-device`` or the environment; None if neither is set.

    Raises:
        ValueError: the value of the environment variable is not auto, cuda or cpu.
    """
    asked = None
    for flag, value in itertools.pairwise([*sys.argv[1:], ""]):
        name, equals, own = flag.partition("=")
        value = own if equals else value
        # argparse checks the value later.
        if name in ("--plugin-device", "--s3-device") and value in DEVICES:
            asked = value
    if asked is None and (asked := os.environ.get(DEVICE) or None) not in (None, *DEVICES):
        raise ValueError(f"{DEVICE}={asked}: expected auto, cuda or cpu; change or unset it")
    return asked
