"""The command ``python -m megatron_s3 SCRIPT ARGS``, which runs a script with the plugin.

``python -m megatron_s3 -m MODULE ARGS`` runs a module instead of a script.
"""

import importlib.util
import os
import runpy
import sys

from megatron_s3 import register
from megatron_s3.launch import lock
from megatron_s3.mcore.refusal import in_one_line
from megatron_s3.mcore.registration import asked_device

USAGE = """\
usage: torchrun [...] -m megatron_s3 SCRIPT [ARGS ...]
       torchrun [...] -m megatron_s3 -m MODULE [ARGS ...]

Makes --optimizer s3 known to Megatron-LM, then runs SCRIPT, for example the pretrain_gpt.py of a
Megatron-LM checkout, or a module, as python would. ARGS are the arguments of the script. Without a
checkout, run torchrun [...] -m megatron_s3.pretrain_gpt [ARGS ...]"""


def main(argv: list[str]) -> int:
    """Runs the script ``argv[0]``, or the module behind ``-m``, with the arguments that follow it.

    Returns:
        The exit status: 2 if there is no such script or module. The script's own ``sys.exit``
        passes through.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "-m":
        return _module(argv[1:])
    script = argv[0]
    if not os.path.isfile(script):
        print(f"[megatron_s3] no such script: {script}", file=sys.stderr)
        return 2
    sys.argv = argv
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    lock.join()
    register(asked_device() or "auto")
    with in_one_line():
        runpy.run_path(script, run_name="__main__")
    return 0


def _module(argv: list[str]) -> int:
    sys.path[0] = os.getcwd()  # as python -m does
    try:
        found = argv and importlib.util.find_spec(argv[0])
    except ImportError:  # its package cannot be imported
        found = None
    if not found:
        print(f"[megatron_s3] no such module: {' '.join(argv[:1])}", file=sys.stderr)
        return 2
    sys.argv = argv
    lock.join()
    register(asked_device() or "auto")
    with in_one_line():
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
