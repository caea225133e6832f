"""Ranks as forks: what they are told, how they end."""

import json
import os
import textwrap
from pathlib import Path

import pytest

from tests.harness import fresh
from tests.harness.forks import TIMED_OUT, Forks
from tests.harness.trainer import forks

pytestmark = pytest.mark.slow

PROGRAM = """\
import json, os, sys, subprocess, torch.distributed as dist
dist.init_process_group("gloo")
count = [None] * dist.get_world_size()
dist.all_gather_object(count, [dist.get_rank(), sys.argv[1:], os.getpid()])
if dist.get_rank() == 0:
    print(json.dumps(count), flush=True)
if sys.argv[1:]:
    child = subprocess.Popen(["sleep", "1000"])
    with open(sys.argv[2], "a") as children:
        children.write(f"{child.pid} ")
    dist.barrier()
    if "fail" in sys.argv and dist.get_rank() == 1:
        sys.exit(7)
    child.wait()
"""


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize(
    ("argv", "limit", "status"), [([], 0, 0), (["fail"], 0, 7), (["hang"], 3, TIMED_OUT)]
)
def test_ranks_end_together(argv: list[str], limit: int, status: int, tmp_path: Path) -> None:
    """With the status of the one that failed, at the limit, and with what they have started."""
    program, log, children = tmp_path / "program.py", tmp_path / "log", tmp_path / "children"
    program.write_text(PROGRAM)
    argv = [*argv, str(children)] if argv else []
    assert forks().run(argv, 2, log, program, limit) == status
    ranks = json.loads(log.read_text().splitlines()[0])
    assert [rank[:2] for rank in ranks] == [[0, argv], [1, argv]]
    started = children.read_text().split() if children.exists() else []
    assert len(started) == (2 if argv else 0)
    assert all(gone(int(pid)) for pid in [*started, *(rank[2] for rank in ranks)])


def test_a_megatron_that_cannot_be_imported_is_told(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('not this one')")
    with pytest.raises(RuntimeError, match="not this one"):
        Forks(tmp_path)


def test_a_fresh_process_is_new_and_its_end_is_seen() -> None:
    """Its output, errors and status are its own, and so are its environment and modules."""
    code = """
        import os, sys
        print([n for n in sys.modules if n.split(".")[0] in ("megatron", "megatron_s3", "tests")])
        print(dict(os.environ), sys.argv, "torch" in sys.modules)
        assert False, "seen"
    """
    done = fresh.run("-c", textwrap.dedent(code), "x", env={"A": "b"})
    assert done.stdout == "[]\n{'A': 'b'} ['-c', 'x'] True\n"
    assert done.returncode == 1 and done.stderr.endswith("AssertionError: seen\n")
    assert fresh.run("-c", "raise SystemExit(3)").returncode == 3
    assert fresh.run("-c", "raise SystemExit('why')").stderr == "why\n"
