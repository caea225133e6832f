"""tests.upstream.launch_scripts over a made-up tree."""

import subprocess
import sys
from pathlib import Path


def test_launches_are_compared_with_what_they_have_to_become(tmp_path: Path) -> None:
    (tmp_path / "examples/post_training/modelopt/conf").mkdir(parents=True)
    (tmp_path / "examples/right.sh").write_text(
        "LR=1e-4\nsrun -l torchrun train.py --lr $LR --adam-beta1 0.9 --clip-grad 1 --x $1\n"
    )
    (tmp_path / "examples/refused.sh").write_text("torchrun train.py --lr $1\n")
    (tmp_path / "examples/silent.sh").write_text("false && torchrun train.py --lr 1\n")
    run = subprocess.run(
        [sys.executable, "-m", "tests.upstream.launch_scripts", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1, run.stderr
    assert run.stdout.splitlines()[:3] == [
        "refused   examples/refused.sh: --lr $1 is not a number in this text; write a number, or "
        "set the variable in the script",
        "right     examples/right.sh (launches: 1)",
        "WRONG     examples/silent.sh: nothing was started",
    ]
    run = subprocess.run(
        [sys.executable, "-m", "tests.upstream.launch_scripts", tmp_path, "--convert-only"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[1:] == [
        "converted examples/right.sh",
        "converted examples/silent.sh",
        "",
        "3 scripts with --lr: {'converted': 2, 'refused': 1}",
    ]
