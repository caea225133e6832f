"""S3 (SoftSignSGD) for PyTorch and Megatron-LM.

``S3`` is a :class:`torch.optim.Optimizer` for any model.  ``register`` makes ``--optimizer s3``
known to Megatron-LM.  Megatron is imported when ``register`` is called, and torch with ``S3``.
"""

from typing import TYPE_CHECKING

from megatron_s3.version import __version__

if TYPE_CHECKING:
    from megatron_s3.optimizers import S3

__all__ = ["S3", "__version__", "register"]


def register() -> None:
    """Makes the plugin's optimizers known to the installed Megatron-LM, before it reads arguments.

    It may be called more than once.  :mod:`megatron_s3.mcore` explains what it patches.

    Raises:
        megatron_s3.mcore.seams.SeamMoved: a function to be patched differs from that of the
            releases with which this version was checked.
    """
    from megatron_s3.mcore import registration

    registration.register()


def __getattr__(name: str) -> type:
    """Imports S3, and torch with it, on first use: `megatron-s3 --help` needs neither."""
    if name == "S3":
        from megatron_s3.optimizers import S3

        return S3
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
