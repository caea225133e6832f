"""torchtitan's trainer with the example of megatron_s3/optimizers/README.md, on two CPU ranks."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.harness.forks import Forks
from tests.harness.tensors import assert_bitwise_equal
from tests.harness.trainer import REPOSITORY

#: Where scripts/test.sh unpacks torchtitan, with the packages that it needs beside the project's.
FOLDER = REPOSITORY / ".venv/torchtitan/0.3.0"
PROGRAM = Path(__file__).with_name("torchtitan_program.py")
PAGE = REPOSITORY / "megatron_s3/optimizers/README.md"


def content(checkpoint: Path, file: Path) -> tuple[dict, dict]:
    """Returns the weights and the optimizer's states, and all other values of a checkpoint."""
    dcp_to_torch_save(checkpoint, file)
    saved = torch.load(file, weights_only=False)
    values = {}
    for key, value in saved.items():
        parts = value if isinstance(value, dict) else {}
        values |= {f"{key}.{name}": part for name, part in parts.items()} or {key: value}
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    return tensors, {name: value for name, value in values.items() if name not in tensors}


@pytest.mark.slow
def test_torchtitan_trains_and_resumes_bitwise(tmp_path):
    if not FOLDER.is_dir():
        pytest.skip(f"torchtitan is not unpacked at {FOLDER}; scripts/test.sh does it")
    (text,) = re.findall(
        r"^### torchtitan\n.*?^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S
    )
    ranks = Forks(FOLDER, PROGRAM, imports="optimizers")

    def train(folder: Path) -> str:
        folder.mkdir(exist_ok=True)
        (folder / "s3_configs.py").write_text(text)
        status = ranks.run([folder, "4"], 2, folder / "log")
        log = (folder / "log").read_text()
        assert status == 0, log[-6000:]
        return log

    through, resumed = tmp_path / "through", tmp_path / "resumed"
    log = train(through)
    assert log.count("S3 4 C++ kernel") == log.count("steps of this launch: 4") == 2
    half = through / "checkpoint/step-2"
    shutil.copytree(half, resumed / "checkpoint/step-2")
    assert train(resumed).count("steps of this launch: 2") == 2
    (one, more), (other, others) = (
        content(folder / "checkpoint/step-4", tmp_path / f"{folder.name}.pt")
        for folder in (through, resumed)
    )
    before, _ = content(half, tmp_path / "half.pt")
    weights = [name for name in one if not name.startswith("optimizer.")]
    states = [
        {n.removesuffix(name) for n in one if n.endswith(name)}
        for name in (".exp_avg", ".exp_pnorm")
    ]
    assert states[0] == states[1] and "optimizer.state.tok_embeddings.weight" in states[0]
    assert len(one) == len(weights) + 2 * len(states[0])
    assert_bitwise_equal(other, one)
    assert others == more and more["train_state.step"] == 4
    group = "optimizer.param_groups.tok_embeddings.weight"
    assert (more[f"{group}.algorithm"], more[f"{group}.weight_decay"]) == ("s3", 0.01)
    assert all(not torch.equal(one[name], before[name]) for name in weights)
