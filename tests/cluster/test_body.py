"""Decisions of the job's body, with stand-ins for SLURM's commands: no cluster is needed."""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
BODY = REPOSITORY / "scripts" / "pretrain.sbatch"

#: Writes down its words; plays the launcher, which saves checkpoint $SAVES and ends with $STATUS.
SRUN = """#!/bin/bash
printf '%s\\n' "$*" >>"$SEEN"
case $* in
  *--print-run-dir*) echo "$RUN_DIR" ;;
  *--print-checkpoint*) cat "$RUN_DIR/checkpoints/latest_checkpointed_iteration.txt" ;;
  *preflight*) exit "${PREFLIGHT_STATUS:-0}" ;;
  *)
    printf '%s ' "$MASTER_ADDR:$MASTER_PORT" >>"$SEEN.meet"
    trap 'caught=1' USR1
    touch "$SEEN.started"
    [ -z "${WAITS:-}" ] || until [ -n "$caught" ]; do sleep 0.05; done
    [ -z "${SAVES:-}" ] || echo "$SAVES" >"$RUN_DIR/checkpoints/latest_checkpointed_iteration.txt"
    exit "${STATUS:-0}"
    ;;
esac
"""
SCONTROL = """#!/bin/bash
if [ "$1 $2" = "show hostnames" ]; then printf '%s\\n' first second; exit 0; fi
echo "$*" >>"$SEEN"
[ -z "${REFUSES:-}" ] || { echo "$REFUSES" >&2; exit 1; }
"""


@pytest.fixture
def job(tmp_path: Path):
    """Runs the body; returns status, what it printed, and the commands that it called."""
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("10")

    def run(
        *words: str, send: signal.Signals | None = None, **environment: str
    ) -> tuple[int, str, list[str]]:
        seen = tmp_path / "seen"
        process = subprocess.Popen(
            ["bash", BODY, *words],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}",
                "SLURM_JOB_ID": "12345",
                "SLURM_JOB_NODELIST": "some[1-2]",
                "SLURM_JOB_NUM_NODES": "2",
                "RUN_DIR": str(tmp_path / "run"),
                "VENV": sys.prefix,
                "SEEN": str(seen),
                **environment,
            },
        )
        if send:
            while not (tmp_path / "seen.started").exists():
                time.sleep(0.02)
            process.send_signal(send)
        printed = process.communicate()[0]
        return process.returncode, printed, seen.read_text().splitlines() if seen.exists() else []

    return run


@pytest.mark.parametrize(
    ("environment", "send", "requeued", "status", "why"),
    [
        ({"SAVES": "20"}, None, False, 0, "finished at checkpoint 20"),
        ({"STATUS": "75", "SAVES": "20"}, "USR1", True, 0, "stopped before the end"),
        ({"STATUS": "75", "SAVES": "20"}, "TERM", False, 75, "not requeued after TERM"),
        (
            {"STATUS": "1", "SAVES": "20"},
            None,
            True,
            0,
            "status 1, checkpoint 10 -> 20",
        ),
        ({"STATUS": "1"}, None, False, 1, "this attempt saved nothing new"),
        (
            {"STATUS": "75", "SAVES": "20", "SLURM_RESTART_COUNT": "2", "MAX_REQUEUES": "2"},
            "USR1",
            False,
            75,
            "2 times already, MAX_REQUEUES is 2",
        ),
        # Another run in the folder has saved what this one could not.
        ({"STATUS": "2", "SAVES": "20"}, None, False, 2, "not requeued: it cannot run, see above"),
    ],
)
def test_requeues(job, environment, send, requeued, status, why) -> None:
    if send:
        environment = {**environment, "WAITS": "1"}
    found = job("config", send=send and signal.Signals[f"SIG{send}"], **environment)
    assert (found[0], "requeue 12345" in found[2]) == (status, requeued), found[1]
    assert why in found[1].splitlines()[-1]


def test_a_task_of_an_array_requeues_itself_alone(job) -> None:
    """The array's id is that of one task too, and for scontrol it means all of them."""
    array = {"SLURM_ARRAY_JOB_ID": "12345", "SLURM_ARRAY_TASK_ID": "2"}
    status, printed, seen = job("config", STATUS="1", SAVES="20", **array)
    assert status == 0
    assert [line for line in seen if "requeue" in line] == ["requeue 12345_2"]
    assert "job 12345_2, attempt 1 on first,second" in printed


def test_a_requeue_that_slurm_refuses_is_none(job) -> None:
    refusal = "Requested operation is presently disabled for job 12345"
    status, printed, seen = job("config", STATUS="75", SAVES="20", REFUSES=refusal)
    assert status == 75 and seen[-1] == "requeue 12345"
    assert printed.splitlines()[-1].endswith(
        f"stopped before the end, checkpoint 10 -> 20; not requeued: SLURM refused it ({refusal}); "
        "submit the same again to go on"
    )
    assert "requeued, 1" not in printed


def test_where_ranks_meet_is_the_sites_choice_if_it_makes_one(job, tmp_path: Path) -> None:
    for given, meet in (
        ({}, "first:22345"),
        ({"MASTER_ADDR": "first-ib0"}, "first-ib0:22345"),
        ({"MASTER_PORT": "5000"}, "first:5000"),
    ):
        job("config", **given)
        assert (tmp_path / "seen.meet").read_text().split()[-1] == meet


def test_steps_have_the_bodys_environment(job) -> None:
    """With SBATCH_EXPORT=NONE SLURM would start them without."""
    _, _, seen = job("config", SLURM_EXPORT_ENV="NONE")
    assert len(seen) == 5 and all(" --export=ALL " in line for line in seen)


@pytest.mark.parametrize("setting", ["MAX_REQUEUES=many", "MAX_REQUEUES=-1", "PREFLIGHT=no"])
def test_refuses_a_setting_that_it_would_not_heed(job, setting: str) -> None:
    status, printed, seen = job("config", STATUS="75", SAVES="20", **dict([setting.split("=")]))
    assert status == 2 and f"error: {setting}: must be " in printed
    assert seen == []


def test_does_not_start_when_requeued_too_often(job) -> None:
    status, printed, seen = job("config", SLURM_RESTART_COUNT="3", MAX_REQUEUES="2")
    assert status == 1 and "not started: requeued 3 times" in printed
    assert [line.split()[-1] for line in seen] == ["--print-run-dir", "--print-checkpoint"]


def test_trains_nothing_after_a_bad_preflight(job) -> None:
    status, printed, seen = job("config", PREFLIGHT_STATUS="1")
    assert status == 1 and "nothing trained" in printed
    assert not any(line.endswith("launch config") for line in seen)


def test_words_reach_the_launcher_on_every_node(job) -> None:
    _, _, seen = job("config", "over.yaml", "--set", "lr=1e-3")
    folder, before, preflight, launch, after = seen
    words = "config over.yaml --set lr=1e-3"
    python = f"{sys.prefix}/bin/python -m megatron_s3."
    assert "--nodes=1 " in folder and folder.endswith(f"{words} --print-run-dir")
    for asks in (before, after):
        assert "--nodes=1 " in asks and asks.endswith(f"{words} --print-checkpoint")
    assert "--nodes=2 --ntasks=2" in preflight and "--nodes=2 --ntasks=2" in launch
    assert f"{python}launch.preflight {words} --nodes first,second --timeout 300" in preflight
    assert launch.endswith(f"{python}cli launch {words}")


def test_containers(job, tmp_path: Path) -> None:
    mounts = f"{tmp_path}:{tmp_path},{tmp_path}/run:{tmp_path}/run,/data:/data"
    given = {"MOUNTS": "/data:/data", "VENV": ""}
    _, _, seen = job("config", CONTAINER="apptainer:a.sif", **given)
    for line in seen:
        assert f" apptainer exec --nv --bind {mounts} --pwd {tmp_path} a.sif python3 -m " in line
    (tmp_path / "seen").unlink()
    _, _, seen = job("config", CONTAINER="pyxis:some/image:tag", **given)
    for line in seen:
        assert "--container-image=some/image:tag " in line
        assert f"--container-mounts={mounts} --container-entrypoint " in line
        assert f"--container-workdir={tmp_path} " in line
        assert " python3 -m megatron_s3." in line


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["config"], {"SLURM_JOB_ID": ""}, "submit it with sbatch"),
        ([], {}, "no configuration"),
        (["config"], {"CONTAINER": "docker:image"}, "neither pyxis:IMAGE nor apptainer:FILE"),
        (["config"], {"VENV": "/nowhere"}, "no /nowhere/bin/python"),
    ],
)
def test_refuses(job, words, environment, message) -> None:
    status, printed, seen = job(*words, **environment)
    assert status == 2 and not seen
    assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1


@pytest.mark.parametrize("script", [BODY, Path(__file__).with_name("with_cluster.sh")])
def test_shellcheck_finds_nothing(script: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=sysconfig.get_path("scripts"))
    if not shellcheck:
        pytest.skip("shellcheck is not installed beside this Python")
    done = subprocess.run([shellcheck, "-x", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_names_no_cluster() -> None:
    options = [x for x in BODY.read_text().splitlines() if x.startswith("#SBATCH")]
    for site in ("account", "partition", "qos", "constraint", "reservation", "nodelist"):
        assert not any(site in option for option in options)
