"""``megatron-s3 plan``: memory, traffic and days of a configuration, without GPUs."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from megatron_s3.launch.config import ConfigError, load
from megatron_s3.launch.plan_text import as_json, text
from megatron_s3.launch.planning import make
from megatron_s3.launch.selection import add_config_arguments

__all__ = ["main"]

#: Peak of an H100 or H200 SXM, TFLOP/s: bf16 on tensor cores without sparsity.
H100_TFLOPS = 989.0


def main(argv: list[str]) -> int:
    """Runs the command; see ``--help``.

    Returns:
        The exit status: 2 if the configuration cannot run or cannot be planned.
    """
    parser = argparse.ArgumentParser(
        prog="megatron-s3 plan",
        description=(
            "Print memory, traffic and days of a configuration, on any number of GPUs. The command "
            "needs no GPU."
        ),
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--gpus",
        type=_positive(int),
        metavar="N",
        help="number of ranks (default: nodes x nproc_per_node)",
    )
    parser.add_argument(
        "--mfu",
        type=_positive(float, 1),
        default=0.4,
        metavar="X",
        help="fraction of the peak that you expect (default: 0.4)",
    )
    parser.add_argument(
        "--peak-tflops",
        type=_positive(float),
        default=H100_TFLOPS,
        metavar="X",
        help=(
            "peak of a GPU in the precision of the training (default: 989, H100 or H200 SXM, "
            "bf16, dense)"
        ),
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers to FILE")
    options = parser.parse_intermixed_args(argv)
    if options.json and not options.json.absolute().parent.is_dir():
        return _refuse(f"--json {options.json}: the folder {options.json.parent} does not exist")
    if options.json and options.json.is_dir():
        return _refuse(f"--json {options.json}: it is a folder; name a file")
    # A plan is the same on every machine, so this machine's GPUs are hidden.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        config = load([options.config, *options.overlay], options.sets)
        plan = make(config, options.gpus, options.mfu, options.peak_tflops * 1e12)
    except ConfigError as error:
        return _refuse(str(error))
    except ImportError as error:
        return _refuse(f"{error}; install torch and megatron-core to make a plan")
    print(text(plan))
    if options.json:
        options.json.write_text(json.dumps(as_json(plan), indent=2) + "\n", encoding="utf-8")
    return 0


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _positive(kind: type, most: float = float("inf")) -> Any:
    def value(word: str) -> Any:
        number = kind(word)
        if not 0 < number <= most or number == float("inf"):
            limit = "" if most == float("inf") else f" and at most {most:g}"
            raise argparse.ArgumentTypeError(f"must be greater than 0{limit}, not {word}")
        return number

    value.__name__ = kind.__name__
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
