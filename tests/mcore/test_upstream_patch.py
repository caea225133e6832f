"""One program through register(), the hook, and a patched Megatron: the same bits."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.harness.releases import INSTALLED, unpacked
from tests.harness.trainer import REPOSITORY, assert_bitwise_equal, forks, tensors

PATCH = REPOSITORY / "patches/upstream/megatron-core-elementwise-optimizers.patch"
PAGE = REPOSITORY / "megatron_s3/mcore/README.md"

#: In place of the program's own registration; Megatron's names of CUDA are given a meaning first.
HEAD = """
import sys
sys.path.insert(0, {tree!r})
from megatron_s3.mcore import cpu_device
cpu_device.select("cpu")
{registration}
"""

#: What Python runs at the start of a process where the hook is installed.
HOOK = """
import os
os.environ |= {"MEGATRON_S3": "1", "MEGATRON_S3_DEVICE": "cpu"}
__import__("megatron_s3.autoregister").autoregister.start()
"""


def registration() -> str:
    page = (PATCH.parent / "README.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)
    return block


@pytest.mark.slow
def test_the_same_bits_and_resumed(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(unpacked(INSTALLED) / "megatron", tree / "megatron", ignore=ignore)
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)  # not this repository's
    subprocess.run(["git", "apply", str(PATCH)], cwd=tree, check=True)
    (text,) = (
        block
        for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S)
        if "sys.argv" in block
    )
    plain = re.sub(
        r"^megatron_s3\.register\(.*$",
        lambda found: HEAD.format(tree=str(tree), registration=registration()),
        text,
        flags=re.M,
    ).replace("s3_p=3.0, ", "clip_grad=0.0, ")
    plain += '\nassert not hasattr(get_megatron_optimizer, "__megatron_s3_seam__")\n'
    plain += f'assert dist_checkpointing.__file__.startswith("{tree}")\n'
    hooked = re.sub(r"^(import megatron_s3|megatron_s3\.register\(.*)$", "", text, flags=re.M)
    assert "megatron_s3" not in hooked
    programs = (("patched.py", plain), ("plugin.py", text), ("hooked.py", HOOK + hooked))
    for name, program in programs:
        (tmp_path / name).write_text(program)

    def run(name: str, *argv: str | Path) -> None:
        with tempfile.NamedTemporaryFile("r", errors="replace") as log:
            words = [str(word) for word in argv]
            ranks = forks(None, "megatron" if name == "plugin.py" else "optimizers")
            status = ranks.run(words, 2, log.name, program=str(tmp_path / name))
            assert status == 0, log.read()[-4000:]

    patched, first, resumed, plugin, hook = (
        tmp_path / name for name in ("patched", "first", "resumed", "plugin", "hook")
    )
    run("patched.py", "8", patched)
    run("patched.py", "4", first)
    run("patched.py", "8", resumed, first)
    run("plugin.py", "8", plugin)
    run("hooked.py", "8", hook)
    assert_bitwise_equal(tensors(hook, None), tensors(plugin, None))
    assert_bitwise_equal(tensors(patched, None), tensors(plugin, None))
    assert_bitwise_equal(tensors(patched, None), tensors(resumed, None))
