"""Megatron's own parser and validation, for jobs that are not running yet.

A job for GPUs can be checked on a machine without GPUs.
"""

import argparse
import contextlib
import copy
import io
import os
import sys
import traceback
import types
from collections.abc import Iterator, Sequence
from unittest import mock

import torch

from megatron_s3.mcore import cpu_device
from megatron_s3.mcore.output import quiet
from megatron_s3.mcore.registration import named_device

__all__ = ["parse", "parser", "prepare", "release"]

#: The device properties that the validation reads, if there is no device: those of an H100 (compute
#: capability 9.0).
_STANDIN = types.SimpleNamespace(
    name="H100", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132
)


def prepare(words: Sequence[str]) -> None:
    """Registers the plugin for a job on the device that ``words`` name.

    Raises:
        RuntimeError: this process was prepared for the CPU, and the job is for GPUs.
        SeamMoved: the installed Megatron is none that the plugin knows.
        ImportError: Megatron is not installed.
    """
    if named_device(words) == "cpu":
        cpu_device.use_cpu()
    elif cpu_device.active():
        raise RuntimeError("a process that has checked a CPU job cannot check one for GPUs")
    with quiet():
        from megatron_s3.mcore import seams  # imports Megatron

        seams.install()


def release() -> str:
    """Returns the version of the Megatron that is installed."""
    from megatron.core.package_info import __version__

    # The text after a "+" is the commit of any repository that contains the environment.
    return str(__version__).partition("+")[0]


def parser() -> argparse.ArgumentParser:
    """Returns Megatron's parser with the plugin's flags; call :func:`prepare` first."""
    from megatron.training import arguments

    with quiet():
        found: argparse.ArgumentParser = arguments.add_megatron_arguments(
            argparse.ArgumentParser(allow_abbrev=False)
        )
    return found


def parse(words: Sequence[str], world_size: int) -> argparse.Namespace:
    """Returns Megatron's validated arguments, as on rank 0 of ``world_size``.

    The environment of this process is used, so it must be that of the ranks.

    Args:
        words: the command line without the program.
        world_size: number of ranks.

    Raises:
        ValueError: Megatron or the plugin rejects them; the message is theirs.
    """
    prepare(words)
    from megatron.training import arguments

    environment = {"RANK": "0", "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}
    errors = io.StringIO()
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(sys, "argv", ["megatron-s3", *words]),
        _device_standin(),
        quiet(),
        contextlib.redirect_stderr(errors),
    ):
        try:
            args: argparse.Namespace = arguments.parse_args()
            folder = args.tensorboard_dir
            args.tensorboard_dir = folder or "."  # a launch uses its own folders
            arguments.validate_args(args, {})
            args.tensorboard_dir = folder  # and nothing is written into this one
            _schedule(copy.copy(args))
        except SystemExit as error:  # raised by argparse
            lines = errors.getvalue().strip().splitlines() or [str(error)]
            raise ValueError(lines[-1].partition("error: ")[2] or lines[-1]) from None
        except Exception as error:  # assertions, and other errors of a release
            raise ValueError(_words_of(error)) from error
    return args


def _schedule(args: argparse.Namespace) -> None:
    """Builds the schedule of the learning rate, which has checks of its own."""
    from megatron.training import training

    if args.skip_train or not (args.train_iters or args.train_samples):
        return
    with mock.patch.object(training, "get_args", return_value=args):
        training.get_optimizer_param_scheduler(types.SimpleNamespace(param_groups=[]))


def _words_of(error: Exception) -> str:
    """Returns the message of an error; for an assertion without one, the condition that failed."""
    if str(error) and not isinstance(error, KeyError):
        return " ".join(str(error).split())
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} {error}: {frame.line} ({frame.filename}:{frame.lineno})"


@contextlib.contextmanager
def _device_standin() -> Iterator[None]:
    if cpu_device.active() or torch.cuda.is_available():
        yield
        return
    with (
        mock.patch.object(torch.cuda, "get_device_properties", return_value=_STANDIN),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
    ):
        yield
