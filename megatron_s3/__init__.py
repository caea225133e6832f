"""S3 (SoftSignSGD) for PyTorch and Megatron-LM.

``S3`` is a :class:`torch.optim.Optimizer` for any model.  ``register`` makes ``--optimizer s3``
known to Megatron-LM; nothing of Megatron is imported before it is called, and torch with ``S3``.
"""

from typing import TYPE_CHECKING

from megatron_s3.version import __version__

if TYPE_CHECKING:
    from megatron_s3.optimizers import S3

__all__ = ["S3", "__version__", "register"]


def register() -> None:
    """Makes the plugin's optimizers known to the installed Megatron-LM, before it reads arguments.

    Idempotent.  See :mod:`megatron_s3.mcore` for what is wrapped and why.

    Raises:
        megatron_s3.mcore.seams.SeamMoved: a function that is wrapped is not as it was in the
            releases this version was checked on.
    """
    from megatron_s3.mcore import registration

    registration.register()


def __getattr__(name: str) -> type:
    """Imports S3, and torch with it, when it is asked for: `megatron-s3 --help` needs neither."""
    if name == "S3":
        from megatron_s3.optimizers import S3

        return S3
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
