"""The runner of Megatron-LM's own tests, on a tree of made-up ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.trainer import REPOSITORY
from tests.upstream import __main__ as upstream_tests
from tests.upstream import reports, verdicts

TESTS = """
import os
import time

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig


def build(name):
    torch.distributed.init_process_group("nccl")
    parallel_state.initialize_model_parallel()
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
    sharded = name == "adam"
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=sharded)
    model = DistributedDataParallel(config, ddp, torch.nn.Linear(40, 30).cuda())
    config = OptimizerConfig(optimizer=name, use_distributed_optimizer=sharded)
    if not sharded:
        config.lr = 0.1  # where upstream's helpers leave None
    return get_megatron_optimizer(config, [model]).chained_optimizers[0]


def test_adams_place():
    optimizer = build("adam")
    assert torch.distributed.get_world_size() == torch.cuda.device_count() == 2
    optimizer.init_state_fn(optimizer.optimizer)
    assert len(optimizer.optimizer.state)


@pytest.mark.parametrize("state", ["exp_avg", "exp_avg_sq"])
def test_names(state):
    optimizer = build("adam")
    optimizer.init_state_fn(optimizer.optimizer)
    assert state in next(iter(optimizer.optimizer.state.values())), "not Adam's"


def test_other():
    build("sgd")


def test_none():
    assert not torch.distributed.is_initialized()  # whatever ran before


def test_one_rank():
    torch.distributed.init_process_group("nccl")
    assert os.environ["RANK"] == "0", "this is rank 1"
    torch.distributed.barrier()


def test_never_ends():
    if OptimizerConfig().optimizer != "adam":
        time.sleep(1000)


@pytest.mark.skipif(True, reason="two GPUs")
def test_skipped():
    pass
"""


@pytest.mark.slow
@pytest.mark.thorough
def test_whole_run(tmp_path: Path) -> None:
    tree, output = tmp_path / "tree", tmp_path / "output"
    folder = tree / "tests" / "unit_tests"
    folder.mkdir(parents=True)
    (tree / "pyproject.toml").write_text("")
    (folder / "test_optimizer.py").write_text(TESTS)
    command = [sys.executable, "-m", "tests.upstream", tree, "--ranks", "2"]
    command += ["--timeout", "30", "--output", output]
    before = sorted(tree.rglob("*"))
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": ""},
        cwd=REPOSITORY,
    )
    assert sorted(tree.rglob("*")) == before
    tests = json.loads((output / "upstream_tests.json").read_text())["tests"]
    found = {test["test"].partition("::")[2]: test for test in tests}
    assert {name: test["verdict"] for name, test in found.items()} == {
        "test_adams_place": "passed",
        "test_names[exp_avg]": "passed",
        "test_names[exp_avg_sq]": "failed",
        "test_other": "passed without",
        "test_none": "passed without",
        "test_one_rank": "fails with adam",
        "test_never_ends": "failed",
        "test_skipped": "skipped",
    }, done.stdout + done.stderr
    s3 = ["ElementwiseDistributedOptimizer(megatron_s3.S3)"]
    assert found["test_adams_place"]["optimizers"] == s3
    assert found["test_other"]["optimizers"] == ["FP32Optimizer(torch.SGD)"]
    assert found["test_none"]["optimizers"] == []
    assert found["test_names[exp_avg_sq]"]["error"].startswith("AssertionError: not Adam's")
    assert found["test_names[exp_avg_sq]"]["adam"]["outcome"] == "passed"
    assert found["test_one_rank"]["error"].startswith("AssertionError: this is rank 1")
    assert found["test_one_rank"]["at"].startswith("tests/unit_tests/test_optimizer.py:")
    assert found["test_never_ends"]["error"] == "not finished after 30.0 s"
    assert found["test_skipped"]["needs"] == "a GPU"
    assert done.returncode == 1
    assert "test_names\n      AssertionError: not Adam's" in done.stdout

    again = subprocess.run(
        [*map(str, command), "--report"], capture_output=True, text=True, check=False
    )
    assert again.stdout == done.stdout[-len(again.stdout) :]


@pytest.mark.parametrize("argument", ["nowhere", "."])
def test_no_tree(argument: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        upstream_tests.main([str(tmp_path / argument)])
    assert "has no tests/unit_tests" in capsys.readouterr().err


def phase(outcome: str, time: float, when: str = "teardown", **more) -> dict:
    return {"outcome": outcome, "time": time, "when": when, "error": "", "at": ""} | more


def test_the_first_rank_that_fails_is_the_one_to_look_at() -> None:
    late = phase("failed", 2.0, "call", error="Connection closed by peer")
    early = phase("failed", 1.0, "call", error="AssertionError: 3 != 4", at="file.py:7")
    merged = reports.merge([[late], [early], []], "waited")
    assert (merged["outcome"], merged["error"], merged["at"]) == (
        "failed",
        "AssertionError: 3 != 4",
        "file.py:7",
    )


def test_no_rank_may_be_missing() -> None:
    good = [phase("passed", 1.0, "call", optimizers=["A(x.S3)"], steps={"x.S3": 2})]
    whole = [*good, phase("passed", 2.0, optimizers=["A(x.S3)"], steps={"x.S3": 3})]
    merged = reports.merge([whole, whole], None)
    assert merged["outcome"] == "passed"
    assert (merged["optimizers"], merged["steps"]) == (["A(x.S3)"], {"x.S3": 3})
    for other in ([], good):
        merged = reports.merge([whole, other], None)
        assert merged["outcome"] == "failed"
        assert merged["error"] == "1 ranks died without a report"
    skipped = [phase("skipped", 1.0, "setup", error="why"), phase("passed", 2.0)]
    assert reports.merge([whole, skipped], None)["outcome"] == "passed"
    assert reports.merge([skipped, skipped], None)["error"] == "why"


def test_what_is_explained_is_named_by_a_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "EXPLAINED", ((r"::test_name$", "asserts Adam's name"),))
    result = {"outcome": "failed", "error": "KeyError", "at": "", "optimizers": [], "steps": {}}
    results = {name: result | {"test": name} for name in ("a::test_name", "a::test_names")}
    adams = {name: result | {"outcome": "passed"} for name in results}
    (one, other) = verdicts.judge(results, adams, "s3")
    assert (one["verdict"], one["reason"]) == ("explained", "asserts Adam's name")
    assert (other["verdict"], other["reason"]) == ("failed", "")


@pytest.mark.parametrize(
    ("built", "optimizer", "verdict"),
    [
        (["A(megatron_s3.S3)"], "s3", "passed"),
        (["A(megatron_s3.Lion)", "torch.SGD"], "s3", "passed without"),
        (["A(torch.AdamW)"], "adam", "passed"),
        (["torch.Adam"], "adam", "passed"),
        ([], "adam", "passed without"),
    ],
)
def test_a_pass_counts_where_the_optimizer_was_built(built, optimizer, verdict) -> None:
    result = {"test": "a", "outcome": "passed", "error": "", "optimizers": built}
    (test,) = verdicts.judge({"a": result}, {}, optimizer)
    assert test["verdict"] == verdict


def test_a_failure_before_the_optimizer_is_not_held_against_it() -> None:
    error = "NameError: name 'TENorm' is not defined"
    result = {"test": "a", "outcome": "failed", "error": error, "at": "", "steps": {}}
    early, late = result | {"optimizers": []}, result | {"optimizers": ["A(megatron_s3.S3)"]}
    adam = {"outcome": "passed", "error": "", "at": ""}
    for found, adams, verdict, needs in (
        (early, {}, "failed without", "Transformer Engine"),
        (early, {"a": adam}, "failed", ""),
        (early, {"a": adam | {"outcome": "failed"}}, "fails with adam", "Transformer Engine"),
        (late, {}, "failed", ""),
    ):
        (test,) = verdicts.judge({"a": found}, adams, "s3")
        assert (test["verdict"], test["needs"]) == (verdict, needs)
