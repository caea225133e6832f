"""The examples of megatron_s3/optimizers/README.md in other programs, as they stand there."""

import contextlib
import copy
import io
import re
import warnings
from pathlib import Path

import pytest
import torch

from megatron_s3 import S3
from tests.mcore.library import on_ranks

PAGE = Path(__file__).parents[2] / "megatron_s3/optimizers/README.md"
EXAMPLES = dict(
    re.findall(r"^### ([^\n]*)\n(?:(?!^#).)*?^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
)


def run(name: str, text: str | None = None) -> dict:
    """Runs an example in this process, and returns its variables."""
    space = {"__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(text or EXAMPLES[name], name, "exec"), space)
    return space


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_hugging_face_trainer_resumes_bitwise(folder):
    name = "Hugging Face Trainer"
    through = run(name)
    optimizer = through["trainer"].optimizer.optimizer
    assert type(optimizer) is S3 and optimizer.param_groups[0]["step"] == 8
    resumed = run(
        name,
        EXAMPLES[name].replace("trainer.train()", 'trainer.train("trainer/checkpoint-4")'),
    )
    assert resumed["trainer"].state.global_step == 8
    assert same(weights(through["model"]), weights(resumed["model"]))


def test_accelerate_resumes_bitwise(folder):
    space = run("Accelerate")
    model, optimizer, loader = (space[name] for name in ("model", "optimizer", "loader"))
    assert type(optimizer.optimizer) is S3

    def more() -> list[torch.Tensor]:
        for x, y in loader:
            space["accelerator"].backward(torch.nn.functional.mse_loss(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
        return weights(model)

    through = more()
    space["accelerator"].load_state("accelerate")
    assert not same(through, weights(model))
    assert same(through, more())


def test_lightning_resumes_bitwise(folder):
    """With OneCycleLR at its defaults, which cycles beta."""
    text = EXAMPLES["Lightning"]
    space = run("Lightning")
    (optimizer,) = space["trainer"].optimizers
    assert type(optimizer) is S3 and optimizer.param_groups[0]["step"] == 16
    half = run("Lightning", text.replace("max_epochs=2", "max_epochs=1"))
    assert not same(weights(space["module"]), weights(half["module"]))
    resumed = run(
        "Lightning",
        text.replace("fit(module, loader)", 'fit(module, loader, ckpt_path="lightning.ckpt")'),
    )
    assert same(weights(space["module"]), weights(resumed["module"]))


@on_ranks(2, megatron=False)
def test_zero_redundancy_optimizer_has_the_bits_of_the_whole():
    text = EXAMPLES["ZeroRedundancyOptimizer"]
    sharded = run("ZeroRedundancyOptimizer")
    whole = run(
        "ZeroRedundancyOptimizer",
        text.replace("ZeroRedundancyOptimizer(model", "S3(model")
        .replace("optimizer_class=S3, ", "")
        .replace("optimizer.consolidate_state_dict()", ""),
    )
    assert same(weights(sharded["model"]), weights(whole["model"]))
    if torch.distributed.get_rank() == 0:
        saved, right = sharded["optimizer"].state_dict(), whole["optimizer"].state_dict()
        assert saved["state"].keys() == right["state"].keys()
        for index, state in right["state"].items():
            assert all(torch.equal(saved["state"][index][name], state[name]) for name in state)
        fresh = S3(weights(whole["model"]))
        fresh.load_state_dict(copy.deepcopy(saved))
        assert fresh.param_groups[0]["step"] == 8
