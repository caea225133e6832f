"""Makes the plugin's optimizers known to the installed Megatron-LM."""

import itertools
import sys

from megatron_s3.mcore import cpu_device
from megatron_s3.mcore.arguments import DEVICES

__all__ = ["register"]


def register() -> None:
    """Does what :func:`megatron_s3.register` says.

    The device is chosen first, from ``--plugin-device`` on the command line: Megatron looks at
    torch.cuda while it is imported, long before it parses arguments.
    """
    cpu_device.select(_device_asked_for(sys.argv[1:]))
    from megatron_s3.mcore import seams  # imports Megatron

    seams.install()


def _device_asked_for(argv: list[str]) -> str:
    """Returns the value of ``--plugin-device``, which argparse reads and checks again later."""
    asked = "auto"
    for flag, value in itertools.pairwise([*argv, ""]):
        name, equals, own = flag.partition("=")
        value = own if equals else value
        if name in ("--plugin-device", "--s3-device") and value in DEVICES:
            asked = value
    return asked
