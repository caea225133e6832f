"""S3 (SoftSignSGD) for PyTorch and Megatron-LM.

``S3`` is a :class:`torch.optim.Optimizer` for any model.  ``register`` makes ``--optimizer s3``
known to Megatron-LM.  Megatron is imported when ``register`` is called, and torch with ``S3``.
"""

from typing import TYPE_CHECKING

from megatron_s3.version import __version__

if TYPE_CHECKING:
    from megatron_s3.optimizers import S3

__all__ = ["S3", "__version__", "register"]


def register(device: str | None = None) -> None:
    """Makes the plugin's optimizers known to the installed Megatron-LM and megatron-core.

    Call it in every process that builds an optimizer or reads a checkpoint.  It may be called more
    than once, and after other modules have imported Megatron's functions: each module that holds a
    function which the plugin wraps is given the wrapper.  A reference that cannot be replaced (in a
    list or a closure, for example) is named in a line of output.  :mod:`megatron_s3.mcore` explains
    what is patched.

    Args:
        device: ``"cpu"`` lets Megatron train on the CPU with gloo, in this process and for good;
            ``"cuda"`` requires a GPU; ``"auto"`` takes the GPU if torch sees one, and else the CPU.
            None takes the value of ``--plugin-device`` on the command line or of the environment
            variable ``MEGATRON_S3_DEVICE``; without both, nothing about devices is changed.

    Raises:
        megatron_s3.mcore.seams.SeamMoved: a function to be patched differs from that of the
            releases with which this version was checked.  Nothing was patched.
        RuntimeError: ``device`` is ``"cuda"``, and torch sees no GPU.
        ValueError: ``device``, or the environment variable, is none of the three.
    """
    from megatron_s3.mcore import registration

    registration.register(device)


def __getattr__(name: str) -> type:
    """Imports S3, and torch with it, on first use: `megatron-s3 --help` needs neither."""
    if name == "S3":
        from megatron_s3.optimizers import S3

        return S3
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
