"""The launcher: commands, arrays, what it records, and how it stops."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_s3.launch import lock, provenance, run, slurm, stopping
from megatron_s3.launch.config import ConfigError, load
from megatron_s3.launch.progress import progress

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_job(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MASTER_")) or name == "RUN_DIR":
            monkeypatch.delenv(name)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    run.add_config_arguments(parser)
    run.add_run_arguments(parser)
    return parser.parse_args(words)


def test_one_node_meets_itself():
    command = run.torchrun(load(["tiny-s3"]), ["--lr", "1"])
    assert command[1:] == [
        "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
        "--local-addr=127.0.0.1", "-m", "megatron_s3.pretrain_gpt", "--lr", "1",
    ]  # fmt: skip


def test_several_nodes_meet_where_slurm_says(monkeypatch):
    monkeypatch.setenv("SLURM_NODEID", "3")
    monkeypatch.setenv("MASTER_ADDR", "node0")
    monkeypatch.setenv("MASTER_PORT", "12345")
    config = load(["layouts/gpt2-7b/64gpu"], ["launch.script=Megatron-LM/pretrain_gpt.py"])
    assert run.torchrun(config, [])[3:] == [
        "--nproc-per-node=8", "--nnodes=8", "--node-rank=3", "--master-addr=node0",
        "--master-port=12345", "-m", "megatron_s3", "Megatron-LM/pretrain_gpt.py",
    ]  # fmt: skip


def test_a_run_keeps_everything_in_its_folder(tmp_path):
    words = run.megatron_words(load(["tiny-s3"], ["save=elsewhere"]), tmp_path)
    assert words[words.index("--save") + 1] == "elsewhere"
    assert words.count("--save") == 1
    assert words[words.index("--load") + 1] == "elsewhere"
    assert words[words.index("--tensorboard-dir") + 1] == str(tmp_path / "tensorboard")


def test_without_data_nothing_starts(tmp_path):
    with pytest.raises(ConfigError, match="nothing to train on; --set dataset=PREFIX"):
        run.megatron_words(load(["gpt2-7b-s3"]), tmp_path)


def test_a_job_of_another_size_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    assert run.main(["tiny-s3", "--run-dir", str(tmp_path)]) == 2
    assert (
        "error: launch.nodes is 1 (configs/models/tiny.yaml:27), but the SLURM job has 3 nodes; "
        "submit with --nodes=1, or --set launch.nodes=3" in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_several_nodes_without_slurm_are_refused(tmp_path, capsys):
    status = run.main(["tiny-s3", "--set", "launch.nodes=2", "--run-dir", str(tmp_path)])
    assert status == 2
    assert (
        "2 nodes, but SLURM_NODEID, MASTER_ADDR, MASTER_PORT is not set" in capsys.readouterr().err
    )


def test_an_array_has_a_run_for_each_combination(tmp_path):
    words = ["tiny-s3", "--set", "array.lr=[1e-3, 3e-3]", "--set", "array.seed=[1, 2]"]
    assert list(run.array_tasks(load(words[:1], words[2::2]))) == [
        "lr-1e-3-seed-1", "lr-1e-3-seed-2", "lr-3e-3-seed-1", "lr-3e-3-seed-2",
    ]  # fmt: skip
    config, folder = run.resolve(arguments(*words, "--run-dir", str(tmp_path), "--task", "2"))
    assert folder == tmp_path / "lr-3e-3-seed-1"
    assert (config.arguments["lr"], config.arguments["seed"]) == ("3e-3", "1")
    assert config.arguments["weight_decay"] == "0.01"
    with pytest.raises(ConfigError, match="an array of 4 runs"):
        run.resolve(arguments(*words))
    with pytest.raises(ConfigError, match="--task 4: the array has the runs 0 to 3"):
        run.resolve(arguments(*words, "--task", "4"))


def test_sbatch_is_asked_for_what_the_configuration_says(tmp_path):
    config = load(
        ["layouts/gpt2-7b/64gpu"], ["launch.time=12:00:00", "launch.sbatch.partition=big"]
    )
    assert slurm.command(config, ["layouts/gpt2-7b/64gpu"], tmp_path, 0) == [
        "sbatch", "--job-name=gpt2-7b-64gpu", "--nodes=8",
        f"--output={tmp_path}/slurm-%j.out", "--open-mode=append", "--time=12:00:00",
        "--gpus-per-node=8", "--partition=big", f"{tmp_path}/pretrain.sbatch",
        "layouts/gpt2-7b/64gpu",
    ]  # fmt: skip
    tiny = slurm.command(load(["tiny-s3"], ["launch.sbatch.exclusive=true"]), [], tmp_path, 4)
    assert not any("gpus" in word for word in tiny)
    assert {"--array=0-3", "--exclusive", f"--output={tmp_path}/slurm-%A_%a.out"} <= set(tiny)
    gres = slurm.command(load(["gpt2-7b-s3"], ["launch.sbatch.gres=gpu:8"]), [], tmp_path, 0)
    assert "--gres=gpu:8" in gres
    assert not any("gpus" in word for word in gres)


def test_an_attempt_is_recorded_and_secrets_are_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hush")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    provenance.record(tmp_path, load(["tiny-s3"]), ["torchrun", "a b"])
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    provenance.record(tmp_path, load(["tiny-s3"], ["seed=5"]), ["torchrun"])
    assert capsys.readouterr().out == (
        "[megatron-s3] the configuration changed since the last attempt: seed: 1234 -> seed: 5\n"
    )
    first = tmp_path / "provenance/job-17-0"
    assert (first / "command.txt").read_text() == "torchrun 'a b'\n"
    assert "torch==" in (first / "packages.txt").read_text()
    environment = (first / "environment.txt").read_text()
    assert "HF_TOKEN=(not written down)" in environment
    assert "hush" not in environment
    (node,) = first.glob("node-*.json")
    assert json.loads(node.read_text())["memory_bytes"] > 0
    assert load([str(tmp_path / "config.yaml")]).arguments["seed"] == "5"
    monkeypatch.setenv("SLURM_NODEID", "1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    provenance.record(tmp_path, load(["tiny-s3"]), [])
    assert [p.name[:5] for p in (tmp_path / "provenance/job-17-2").iterdir()] == ["node-"]


@pytest.mark.parametrize("held", ["run", "run/checkpoints", "elsewhere"])
def test_a_folder_in_use_is_refused(tmp_path, monkeypatch, capsys, held):
    monkeypatch.setattr(run, "ask_megatron", lambda *args: None)
    words = ["tiny-s3", "--run-dir", str(tmp_path / "run")]
    if held == "elsewhere":
        words += ["--set", f"save={tmp_path}/elsewhere"]
    with lock.hold([tmp_path / held]):
        assert run.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f"error: {tmp_path / held} is in use by another launch: process {os.getpid()} on "
    )
    assert not (tmp_path / "run/provenance").exists()


def test_other_nodes_of_a_job_share_its_folder(tmp_path, monkeypatch):
    """Only the first takes the lock; ranks of all nodes hold it."""
    config = load(["tiny-s3"])
    with run._alone(config, tmp_path) as first:
        monkeypatch.setenv("SLURM_NODEID", "1")
        with run._alone(config, tmp_path) as second:
            assert first == second
            files = json.loads(second[lock.VARIABLE])[1:]
    assert files == [f"{tmp_path}/lock", f"{tmp_path}/checkpoints/lock"]


def losses(log: str) -> dict[int, str]:
    return {
        int(i): loss for i, loss in re.findall(r"iteration +(\d+)/.*?lm loss: ([\d.E+-]+)", log)
    }


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path):
    """Status 75 and a checkpoint; then 0 and the last iteration; then nothing to do.

    The signal comes in the first seconds, before there are ranks: they start, and end at once.
    SIGUSR1 takes the same way; the cluster's tests send it in mid-run.
    """
    command = [
        sys.executable, "-m", "megatron_s3.cli", "launch", "tiny-s3", "--run-dir", str(tmp_path),
        "--set", "train_iters=100", "--set", "save_interval=1000",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        while not stopping.catches(process.pid, signal.SIGTERM) and process.poll() is None:
            time.sleep(0.01)
        process.terminate()
        assert process.wait() == run.STOPPED, log.read_text()[-4000:]
    stopped = progress(load(["tiny-s3"]), tmp_path).saved
    assert 0 < stopped < 100
    said = log.read_text()
    assert said.index("SIGTERM: the ranks are asked") < said.index("2 ranks on 1 nodes")
    assert f"stopped at iteration {stopped} of 100 (asked to by SIGTERM)" in said
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stdout[-4000:]
    assert f"going on from iteration {stopped}" in again.stdout
    assert min(losses(again.stdout)) == stopped + 1
    assert progress(load(["tiny-s3"]), tmp_path).saved == 100
    third = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "trained to iteration 100 of 100 already; nothing to do" in third.stdout
    assert third.returncode == 0
