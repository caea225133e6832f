"""The command ``megatron-s3 VERB``, which imports the module of a verb when it is called."""

import importlib
import io
import os
import sys

from megatron_s3.errors import MegatronS3Error
from megatron_s3.log import tell
from megatron_s3.version import __version__

__all__ = ["main"]

VERBS = {
    "launch": ("megatron_s3.launch.launch", "train a configuration, on this node or through SLURM"),
    "plan": (
        "megatron_s3.launch.plan",
        "estimate memory, traffic and days of a configuration on any layout",
    ),
    "args": (
        "megatron_s3.launch.args",
        "convert the arguments of an AdamW launch to those of an S3 launch",
    ),
    "configs": ("megatron_s3.launch.configs", "list and check the configurations"),
    "data": ("megatron_s3.data.__main__", "convert text to Megatron's datasets"),
    "export": (
        "megatron_s3.checkpoints.export",
        "convert a checkpoint to a Hugging Face GPT-2 model",
    ),
    "convert": (
        "megatron_s3.checkpoints.convert",
        "convert an AdamW checkpoint to one that S3 resumes, and back",
    ),
    "report": (
        "megatron_s3.report.__main__",
        "compare finished or running runs in tables and pictures",
    ),
    "eval": (
        "megatron_s3.checkpoints.evaluate",
        "evaluate exported models on the paper's five tasks",
    ),
    "hook": (
        "megatron_s3.autoregister",
        "let MEGATRON_S3=1 register the plugin in programs that nobody edits",
    ),
}

#: Verbs that import PyTorch for seconds before they read their arguments.
SLOW = ("convert", "export")
#: Packages that an installation may lack, with what `pip install` needs for each.
PACKAGES = {
    "megatron": "'megatron-s3[megatron]'",
    "psutil": "psutil",
    "torch": "torch",
    "matplotlib": "matplotlib",
    "tensorboard": "tensorboard",
    "transformers": "'megatron-s3[eval]'",
    "huggingface_hub": "'megatron-s3[eval]'",
    "safetensors": "'megatron-s3[eval]'",
    "lm_eval": "'megatron-s3[eval]'",
    "tokenizers": "'megatron-s3[data]'",
}


def _usage() -> str:
    verbs = "".join(f"  {name:8} {what}\n" for name, (_, what) in VERBS.items())
    options = "Run megatron-s3 VERB --help for the options of a verb."
    return f"usage: megatron-s3 VERB [...]\n\n{verbs}\n{options}"


def main(argv: list[str] | None = None) -> int:
    """Runs a verb with the arguments that follow it.

    Returns:
        Its exit status; 2 for an unknown verb, or if a package is missing; 1 if what it prints or
        writes cannot be written; 130 if it is interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    # A name that the output's encoding lacks must not end the work whose result is printed.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    if argv and argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if argv and argv[0] == "--version":
        print(f"megatron-s3 {__version__}")
        return 0
    if not argv or argv[0] not in VERBS:
        what = f"error: unknown verb {argv[0]!r}\n" if argv else ""
        print(what + _usage(), file=sys.stderr)
        return 2
    os.environ.pop("RANK", None)  # of a program around this one; a verb is no rank, and speaks
    if argv[0] in SLOW:
        tell("loading PyTorch")
    try:
        status: int = importlib.import_module(VERBS[argv[0]][0]).main(argv[1:])
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # head(1) has read enough
            _discard_output()
        else:
            print(f"error: megatron-s3 {argv[0]}: {error}", file=sys.stderr)
        return 1
    except MegatronS3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in PACKAGES:
            raise
        print(
            f"error: megatron-s3 {argv[0]} needs {package}, which is not installed here "
            f"({error}): pip install {PACKAGES[package]}",
            file=sys.stderr,
        )
        return 2
    return status


def _discard_output() -> None:
    """Sends the rest of the output nowhere, so that Python's end does not try to write it again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
