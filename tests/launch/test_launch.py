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

from megatron_s3.launch import commands, launch, lock, provenance, selection, slurm, stopping
from megatron_s3.launch.config import ConfigError, load
from megatron_s3.launch.progress import progress
from tests.harness.runs import Run

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_job(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MASTER_")) or name == "RUN_DIR":
            monkeypatch.delenv(name)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    selection.add_config_arguments(parser)
    selection.add_run_arguments(parser)
    return parser.parse_args(words)


def test_one_node_meets_itself():
    command = commands.torchrun(load(["tiny-s3"]), ["--lr", "1"])
    assert command[1:] == [
        "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
        "--local-addr=127.0.0.1", "-m", "megatron_s3.pretrain_gpt", "--lr", "1",
    ]  # fmt: skip


def test_several_nodes_meet_where_slurm_says(monkeypatch):
    monkeypatch.setenv("SLURM_NODEID", "3")
    monkeypatch.setenv("MASTER_ADDR", "node0")
    monkeypatch.setenv("MASTER_PORT", "12345")
    config = load(["layouts/gpt2-7b/64gpu"], ["launch.script=Megatron-LM/pretrain_gpt.py"])
    assert commands.torchrun(config, [])[3:] == [
        "--nproc-per-node=8", "--nnodes=8", "--node-rank=3", "--master-addr=node0",
        "--master-port=12345", "-m", "megatron_s3", "Megatron-LM/pretrain_gpt.py",
    ]  # fmt: skip


def test_a_run_keeps_everything_in_its_folder(tmp_path):
    words = commands.megatron_words(load(["tiny-s3"], ["save=elsewhere"]), tmp_path)
    assert words[words.index("--save") + 1] == "elsewhere"
    assert words.count("--save") == 1
    assert words[words.index("--load") + 1] == "elsewhere"
    assert words[words.index("--tensorboard-dir") + 1] == str(tmp_path / "tensorboard")


def test_a_list_of_an_array_is_several_words(tmp_path):
    words = ["tiny-s3", "--set", "array.data_path=[[a, b], [c]]", "--task", "0"]
    config, _ = selection.resolve(arguments(*words))
    assert config.arguments["data_path"] == ["a", "b"]


@pytest.mark.parametrize("name", ["save", "load", "tensorboard_dir", "data_cache_path"])
def test_a_folder_without_a_name_is_refused(tmp_path, name):
    """Megatron takes it for none, and would save nothing or resume nothing."""
    with pytest.raises(ConfigError, match=f"{name} is empty; name a folder, or leave it out to"):
        commands.megatron_words(load(["tiny-s3"], [f"{name}=''"]), tmp_path)


def test_without_data_nothing_starts(tmp_path):
    with pytest.raises(ConfigError, match="no data to train on; set dataset=PREFIX"):
        commands.megatron_words(load(["gpt2-7b-s3"]), tmp_path)


def test_a_job_of_another_size_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    assert launch.main(["tiny-s3", "--run-dir", str(tmp_path)]) == 2
    assert (
        "error: launch.nodes is 1 (configs/models/tiny.yaml:27), but the SLURM job has 3 nodes; "
        "submit with --nodes=1, or --set launch.nodes=3" in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_several_nodes_without_slurm_are_refused(tmp_path, capsys):
    status = launch.main(["tiny-s3", "--set", "launch.nodes=2", "--run-dir", str(tmp_path)])
    assert status == 2
    assert (
        "2 nodes, but SLURM_NODEID, MASTER_ADDR, MASTER_PORT is not set" in capsys.readouterr().err
    )


def test_an_array_has_a_run_for_each_combination(tmp_path):
    words = ["tiny-s3", "--set", "array.lr=[1e-3, 3e-3]", "--set", "array.seed=[1, 2]"]
    assert list(selection.array_tasks(load(words[:1], words[2::2]))) == [
        "lr-1e-3-seed-1", "lr-1e-3-seed-2", "lr-3e-3-seed-1", "lr-3e-3-seed-2",
    ]  # fmt: skip
    config, folder = selection.resolve(arguments(*words, "--run-dir", str(tmp_path), "--task", "2"))
    assert folder == tmp_path / "lr-3e-3-seed-1"
    assert (config.arguments["lr"], config.arguments["seed"]) == ("3e-3", "1")
    assert config.arguments["weight_decay"] == "0.01"
    with pytest.raises(ConfigError, match="an array of 4 runs"):
        selection.resolve(arguments(*words))
    with pytest.raises(ConfigError, match="--task 4: the array has runs 0 to 3"):
        selection.resolve(arguments(*words, "--task", "4"))


def test_sbatch_is_asked_for_what_the_configuration_says(tmp_path):
    config = load(
        ["layouts/gpt2-7b/64gpu"], ["launch.time=12:00:00", "launch.sbatch.partition=big"]
    )
    assert slurm.command(config, ["layouts/gpt2-7b/64gpu"], tmp_path, 0) == [
        "sbatch", "--job-name=gpt2-7b-64gpu", "--nodes=8",
        f"--output={tmp_path}/slurm-%j.out", "--open-mode=append", f"--chdir={os.getcwd()}",
        "--time=12:00:00", "--gpus-per-node=8", "--signal=B:USR1@600", "--partition=big",
        f"{tmp_path}/pretrain.sbatch", "layouts/gpt2-7b/64gpu",
    ]  # fmt: skip
    tiny = slurm.command(load(["tiny-s3"], ["launch.sbatch.exclusive=true"]), [], tmp_path, 4)
    assert not any("gpus" in word for word in tiny)
    assert {"--array=0-3", "--exclusive", f"--output={tmp_path}/slurm-%A_%a.out"} <= set(tiny)
    gres = slurm.command(load(["gpt2-7b-s3"], ["launch.sbatch.gres=gpu:8"]), [], tmp_path, 0)
    assert "--gres=gpu:8" in gres
    assert not any("gpus" in word for word in gres)


def test_null_takes_a_default_option_away(tmp_path):
    """Also one of the body's own, which sbatch would read there."""
    sets = ["gpus-per-node=null", "open-mode=null", "mem=null", "exclusive=false", "partition=null"]
    config = load(["gpt2-7b-s3"], [f"launch.sbatch.{word}" for word in sets])
    assert slurm.command(config, [], tmp_path, 0) == [
        "sbatch", "--job-name=gpt2-7b-s3", "--nodes=1", f"--output={tmp_path}/slurm-%j.out",
        f"--chdir={os.getcwd()}", "--signal=B:USR1@600", f"{tmp_path}/pretrain.sbatch",
    ]  # fmt: skip
    options = re.findall(r"^#SBATCH (\S+)", slurm._script(config, {}), re.MULTILINE)
    assert options == [
        "--job-name=megatron-s3", "--ntasks-per-node=1", "--requeue", "--signal=B:USR1@180",
    ]  # fmt: skip
    assert load(["tiny-s3"], ["launch.environment.A=true"]).launch.environment["A"] == "true"


def test_null_in_an_array_is_the_run_without_the_flag(tmp_path):
    words = ["tiny-s3", "--set", "s3_beta2=.9", "--set", "array.s3_beta2=[null, .99]"]
    for task, value in enumerate((None, ".99")):
        config, folder = selection.resolve(arguments(*words, "--task", str(task)))
        assert config.arguments.get("s3_beta2") == value
        assert folder.name == f"s3_beta2-{value or 'null'}"


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ("[/data/a, ../../b]", ["data_path-%2Fdata%2Fa", "data_path-..%2F..%2Fb"]),
        ("['a #b', 'c: d', 'yes']", ["data_path-a%20%23b", "data_path-c:%20d", "data_path-yes"]),
        ("['..', 'a b%']", ["data_path-..", "data_path-a%20b%25"]),
        ('["a\\nb", "1e-3,2"]', ["data_path-a%0Ab", "data_path-1e-3,2"]),
    ],
)
def test_a_run_of_an_array_stays_in_the_folder(tmp_path, values, names):
    words = ["tiny-s3", "--set", f"array.data_path={values}", "--run-dir", str(tmp_path)]
    config = load(words[:1], words[2:3])
    assert list(selection.array_tasks(config)) == names
    for task, name in enumerate(names):
        one, folder = selection.resolve(arguments(*words, "--task", str(task)))
        assert folder == tmp_path / name and folder.parent == tmp_path
        assert one.arguments["data_path"] == config.array["data_path"][task]


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ("[]", "the array has no run"),
        ("[1, 1]", "the array has the run seed-1 twice"),
        (f"[{'1' * 260}]", "at most 255 bytes"),
    ],
)
def test_an_array_whose_runs_have_no_folders_is_refused(values, why):
    with pytest.raises(ConfigError, match=f"--set array.seed=.*{why}"):
        selection.array_tasks(load(["tiny-s3"], [f"array.seed={values}"]))


SBATCH = """#!/bin/bash
printf '%s\\n' "$@" >"$SEEN"
env >"$SEEN.env"
"""


@pytest.fixture
def submit(tmp_path, monkeypatch):
    """Submits to a stand-in for sbatch; returns what it was called with: words, and environment."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sbatch").write_text(SBATCH)
    (tmp_path / "bin/sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.setattr(launch, "ask_megatron", lambda *args: None)
    for name in ("SBATCH_EXPORT", "CONTAINER", "VENV"):
        monkeypatch.delenv(name, raising=False)

    def submit(*words: str, status: int = 0) -> tuple[list[str], dict[str, str]]:
        folder = str(tmp_path / "run")
        assert launch.main([*words, "--slurm", "--run-dir", folder]) == status
        if status:
            assert not (tmp_path / "run").exists() and not (tmp_path / "seen").exists()
            return [], {}
        lines = (tmp_path / "seen.env").read_text().splitlines()
        environment = dict(line.split("=", 1) for line in lines if "=" in line)
        return (tmp_path / "seen").read_text().splitlines(), environment

    return submit


def test_a_job_runs_what_was_submitted(submit, tmp_path):
    """The file is edited while the job waits; its copy is not, and names the same places."""
    file = tmp_path / "my.yaml"
    file.write_text("extends: tiny-s3\narguments:\n  lr: 1e-3\n  seed: 5\n")
    sets = ["launch.environment.A=b c", 'log_interval="7"']
    before = load([str(file)], sets)
    *_, script, copy = submit(str(file), *(word for s in sets for word in ("--set", s)))[0]
    file.write_text("extends: nothing\n")
    after = load([copy])
    assert script == f"{tmp_path}/run/pretrain.sbatch"
    assert Path(copy).parents[1] == tmp_path / "run/submitted" and Path(copy).name == "my.yaml"
    assert after.origins == before.origins
    assert after == before
    assert str(after.origins["arguments.lr"]) == f"{file}:3"


def test_the_copy_of_an_array_derives_for_each_run(submit, tmp_path):
    words = ["tiny-s3", "--set", "array.lr=[1e-3, 3e-3]"]
    line, _ = submit(*words)
    assert "--array=0-1" in line
    given = arguments(line[-1], "--run-dir", str(tmp_path / "run"), "--task", "1")
    config, folder = selection.resolve(given)
    assert folder == tmp_path / "run/lr-3e-3"
    assert config.arguments["weight_decay"] == "0.01"
    assert config.arguments["min_lr"] == "0.0003"


def test_a_job_has_the_submitters_settings(submit, tmp_path, monkeypatch):
    """In the script that sbatch takes away, whatever it is told about the environment."""
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    monkeypatch.setenv("MOUNTS", "7 8")
    monkeypatch.setenv("PYTHONPATH", "/a b")
    *_, script, copy = submit("tiny-s3")[0]
    text = Path(script).read_text()
    begin, settings = text.index("\nexport RUN_DIR="), {}
    for name in ("RUN_DIR", "VENV", "MOUNTS", "PYTHONPATH"):
        shown = subprocess.run(
            ["bash", "-c", f"{text[begin : text.index('set -euo')]}\necho \"${name}\""],
            capture_output=True, text=True, env={"PATH": os.environ["PATH"], "RUN_DIR": "/other"},
        )  # fmt: skip
        settings[name] = shown.stdout.strip()
    assert settings == {
        "RUN_DIR": f"{tmp_path}/run", "VENV": sys.prefix, "MOUNTS": "7 8",
        "PYTHONPATH": "/a b",
    }  # fmt: skip
    assert text.index("#SBATCH --signal") < begin < text.index("say()")
    assert Path(copy).stat().st_mode & 0o777 == 0o600


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "ask_megatron", lambda *args: None)
    monkeypatch.setattr(slurm.shutil, "which", lambda name: name)
    assert launch.main(["tiny-s3", "--slurm", "--run-dir", "/proc/run"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: cannot write to /proc/run: ") and said.count("\n") == 1


def test_a_percent_sign_in_the_folder_is_none_of_sbatchs_patterns(tmp_path):
    line = slurm.command(load(["tiny-s3"]), [], tmp_path / "50%joy", 0)
    assert f"--output={tmp_path}/50%%joy/slurm-%j.out" in line
    assert line[-1] == f"{tmp_path}/50%joy/pretrain.sbatch"


def test_overlays_may_stand_behind_options(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "ask_megatron", lambda *args: None)
    words = ["tiny-s3", "--set", "lr=1e-3", "overlays/seeds", "--task", "1"]
    assert launch.main([*words, "--print-run-dir"]) == 0
    assert capsys.readouterr().out == "runs/tiny-s3-seeds/seed-1235\n"


def test_a_script_that_is_not_there_starts_no_ranks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "ask_megatron", lambda *args: None)
    words = ["tiny-s3", "--run-dir", str(tmp_path), "--set", "launch.script=nowhere.py"]
    assert launch.main(words) == 2
    assert "launch.script=nowhere.py: there is no script nowhere.py" in capsys.readouterr().err


def test_the_printed_command_of_several_nodes_can_be_pasted(tmp_path, monkeypatch, capsys):
    """The shell fills in what a job's node knows, and nothing else."""
    monkeypatch.setattr(launch, "ask_megatron", lambda *args: None)
    sets = ["launch.nodes=2", "launch.nproc_per_node=1", "wandb_exp_name='$SLURM_NODEID a'"]
    words = [word for s in sets for word in ("--set", s)]
    assert launch.main(["tiny-s3", *words, "--run-dir", str(tmp_path), "--dry-run"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    place = {"SLURM_NODEID": "1", "MASTER_ADDR": "a b", "MASTER_PORT": "7"}
    pasted = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, env=place
    ).stdout.splitlines()
    assert {"--node-rank=1", "--master-addr=a b", "--master-port=7"} <= set(pasted)
    assert "$SLURM_NODEID a" in pasted


def test_another_jobs_meeting_place_is_not_taken_along(submit, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "here")
    assert submit("tiny-s3")[1]["MASTER_ADDR"] == "here"
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    assert "MASTER_ADDR" not in submit("tiny-s3")[1]


@pytest.mark.parametrize(
    ("words", "environment", "why"),
    [
        (["gpt2-7b-s3"], {}, "no data to train on"),
        (["tiny-s3", "--set", "dataset=/no/such"], {}, "--set dataset=/no/such: dataset: /no/such"),
        (
            ["tiny-s3", "--set", "array.global_batch_size=[8, 7]"],
            {},
            "global_batch_size 7 does not",
        ),
        (["tiny-s3"], {"VENV": "/no/such"}, "VENV=/no/such has no bin/python"),
        (["tiny-s3"], {"MAX_REQUEUES": "many"}, "MAX_REQUEUES=many: the job cannot use this value"),
        (["tiny-s3"], {"PREFLIGHT": "no"}, "PREFLIGHT=no: the job cannot use this value"),
        (["tiny-s3"], {"PREFLIGHT_TIMEOUT": "0.0"}, "PREFLIGHT_TIMEOUT=0.0: the job cannot"),
        (["tiny-s3"], {"MIN_FREE_GIB": "nan"}, "MIN_FREE_GIB=nan: the job cannot use this value"),
        (["tiny-s3"], {"CONTAINER": "image.sif"}, "CONTAINER=image.sif: the job cannot use this"),
        (
            ["tiny-s3", "--set", "launch.environment.WANDB_API_KEY=hush"],
            {"SBATCH_EXPORT": "NONE"},
            "WANDB_API_KEY: credentials are not written to the job's files, and --export=NONE",
        ),
        (
            ["tiny-s3", "--set", "data_path=https://me:hush@host/x"],
            {},
            "data_path looks like a credential",
        ),
    ],
)
def test_what_cannot_run_is_not_submitted(submit, monkeypatch, capsys, words, environment, why):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    submit(*words, status=2)
    said = capsys.readouterr()
    assert why in said.err and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert "hush" not in said.err + said.out


def test_credentials_reach_the_job_and_no_file(submit, tmp_path, monkeypatch, capsys):
    words = ["tiny-s3", "--set", "launch.environment.WANDB_API_KEY=hush"]
    words += ["--set", "launch.environment.PROXY=http://me:hush@host", "--set", "seed=3"]
    words += ["--set", "launch.sbatch.export=ALL,OTHER_TOKEN=hush", "--dry-run"]
    submit_line, environment = submit(*words[:-1])
    assert environment["WANDB_API_KEY"] == "hush"
    assert environment["PROXY"] == "http://me:hush@host"
    assert "--export=ALL,OTHER_TOKEN=hush" in submit_line
    assert launch.main([*words, "--slurm", "--run-dir", str(tmp_path / "run")]) == 0
    assert launch.main([*words, "--run-dir", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr()
    assert "hush" not in printed.out + printed.err
    assert "export WANDB_API_KEY=(not written down)" in printed.out
    monkeypatch.setattr(provenance, "_code", lambda: ("commit 1\n", ""))
    provenance.record(tmp_path / "run", load(["tiny-s3"], words[2:-1:2]), ["a", *words])
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"submitted.txt", "pretrain.sbatch", "tiny-s3.yaml", "config.yaml", "command.txt"} <= {
        path.name for path in files
    }
    for path in files:
        assert "hush" not in path.read_text(), path
        assert path.stat().st_mode & 0o777 == 0o600, path
    again = load([str(tmp_path / "run/config.yaml")])
    assert "WANDB_API_KEY" not in again.launch.environment and again.arguments["seed"] == "3"


def test_what_git_has_not_seen_holds_no_credential(tmp_path, monkeypatch):
    difference = "+++ b/x.py\n+API_KEY = 'hush-hush'\n+lr = 3\n+URL = 'http://me:hush@host'\n"
    monkeypatch.setattr(provenance, "_code", lambda: ("commit 1\n", difference))
    provenance.record(tmp_path, load(["tiny-s3"]), [])
    (path,) = tmp_path.rglob("code.diff")
    text = path.read_text()
    assert "hush" not in text and "+lr = 3\n" in text and path.stat().st_mode & 0o777 == 0o600


def test_a_record_that_was_open_to_all_is_not_any_more(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("arguments:\n  seed: 1\n")
    path.chmod(0o644)
    provenance.record(tmp_path, load(["tiny-s3"]), [])
    assert path.stat().st_mode & 0o777 == 0o600


def test_damaged_record_of_the_last_attempt_does_not_end_the_next_one(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"arguments:\n  seed: \xff\n")
    provenance.record(tmp_path, load(["tiny-s3"]), [])
    assert load([str(tmp_path / "config.yaml")]).arguments["seed"] == "1234"


def test_an_attempt_is_recorded_and_secrets_are_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hush")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    provenance.record(tmp_path, load(["tiny-s3"]), ["torchrun", "a b"])
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    provenance.record(tmp_path, load(["tiny-s3"], ["seed=5"]), ["torchrun"])
    assert capsys.readouterr().out == (
        "[megatron_s3] the configuration changed since the last attempt: seed: 1234 -> seed: 5\n"
    )
    first = tmp_path / "provenance/job-17-0"
    assert (first / "command.txt").read_text() == "torchrun 'a b'\n"
    assert "torch==" in (first / "packages.txt").read_text()
    environment = (first / "environment.txt").read_text()
    assert "HF_TOKEN=(not written down)" in environment
    assert "hush" not in environment and f"PATH={os.environ['PATH']}\n" in environment
    (node,) = first.glob("node-*.json")
    assert json.loads(node.read_text())["memory_bytes"] > 0
    assert load([str(tmp_path / "config.yaml")]).arguments["seed"] == "5"
    monkeypatch.setenv("SLURM_NODEID", "1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    provenance.record(tmp_path, load(["tiny-s3"]), [])
    assert [p.name[:5] for p in (tmp_path / "provenance/job-17-2").iterdir()] == ["node-"]


@pytest.mark.parametrize("held", ["run", "run/checkpoints", "elsewhere"])
def test_a_folder_in_use_is_refused(tmp_path, monkeypatch, capsys, held):
    monkeypatch.setattr(launch, "ask_megatron", lambda *args: None)
    words = ["tiny-s3", "--run-dir", str(tmp_path / "run")]
    if held == "elsewhere":
        words += ["--set", f"save={tmp_path}/elsewhere"]
    with lock.hold([tmp_path / held]):
        assert launch.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f"error: {tmp_path / held} is in use by another launch: process {os.getpid()} on "
    )
    assert not (tmp_path / "run/provenance").exists()


def test_other_nodes_of_a_job_share_its_folder(tmp_path, monkeypatch):
    """Only the first takes the lock; ranks of all nodes hold it."""
    config = load(["tiny-s3"])
    with launch._alone(config, tmp_path) as first:
        monkeypatch.setenv("SLURM_NODEID", "1")
        with launch._alone(config, tmp_path) as second:
            assert first == second
            files = json.loads(second[lock.VARIABLE])[1:]
    assert files == [f"{tmp_path}/lock", f"{tmp_path}/checkpoints/lock"]


@pytest.mark.thorough
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
        assert process.wait() == launch.STOPPED, log.read_text()[-4000:]
    stopped = progress(load(["tiny-s3"]), tmp_path).saved
    assert 0 < stopped < 100
    said = log.read_text()
    assert said.index("SIGTERM received: the ranks save") < said.index("2 ranks on 1 nodes")
    assert f"stopped at iteration {stopped} of 100 (SIGTERM received)" in said
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stdout[-4000:]
    assert f"resuming from iteration {stopped}" in again.stdout
    assert min(Run(0, again.stdout).column("lm loss")) == stopped + 1
    assert progress(load(["tiny-s3"]), tmp_path).saved == 100
    third = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "training is already finished: iteration 100 of 100" in third.stdout
    assert third.returncode == 0
