"""The shipped job body in a real SLURM cluster of three nodes."""

import re
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import Job

pytestmark = pytest.mark.cluster

TWO_NODES = ["tiny-s3", "--set", "launch.nodes=2", "--set", "launch.nproc_per_node=1"]
#: About a third of a second for an iteration.
SLOW = ["--set", "global_batch_size=32"]
QUICK = {"PREFLIGHT": "0"}


@pytest.fixture
def short(tmp_path: Path) -> list[str]:
    """A run of 4 iterations on one rank, as an array of two learning rates or alone."""
    array = tmp_path / "array.yaml"
    array.write_text("array:\n  lr: [1e-3, 3e-3]\n")
    return ["tiny-s3", "--set", "launch.nproc_per_node=1", "--set", "train_iters=4"]


def test_array_and_chain(cluster, short: list[str], tmp_path: Path) -> None:
    both = ["tiny-s3", str(tmp_path / "array.yaml"), *short[1:]]
    array = cluster.submit(tmp_path / "search", *both, options="--array=0-1", **QUICK)
    link = "--job-name=chain --dependency=singleton"
    chain = [cluster.submit(tmp_path / "chain", *short, options=link, **QUICK) for _ in range(2)]

    for job in chain:
        assert job.wait_for_end() == "COMPLETED", job.log
    assert chain[0].said[-1] == "finished at checkpoint 4"
    assert len(chain[0].attempts[0]) == 3
    assert "training is already finished: iteration 4 of 4" in chain[1].log
    assert "attempt 1 on" in chain[1].said[0] and chain[1].said[0].endswith("checkpoint 4")
    assert not chain[1].attempts[0]

    assert array.wait_for_end() == "COMPLETED"
    folders = [tmp_path / "search" / name for name in ("lr-1e-3", "lr-3e-3")]
    logs = [path.read_text() for path in sorted((tmp_path / "search").glob("slurm-*.out"))]
    assert len(logs) == 2
    for folder in folders:
        assert (folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "4"
        mine = next(log for log in logs if str(folder) in log)
        rate = float(folder.name.removeprefix("lr-"))
        # The last warmup iteration is the peak.
        assert max(map(float, re.findall(r"learning rate: (\S+)", mine))) == pytest.approx(rate)


def test_a_task_requeues_itself_and_no_other(cluster, tmp_path: Path) -> None:
    """The one that has the array's id as its own; the others train on. None ends before that."""
    words = ["tiny-s3", "overlays/seeds", "--set", "launch.nproc_per_node=1"]
    words += [*SLOW, "--set", "train_iters=5000", "--set", "save_interval=10000"]
    array = cluster.submit(tmp_path, *words, options="--array=0-2", **QUICK)

    def logs() -> dict[str, str]:
        """What tasks have said, by their numbers."""
        found = {}
        for path in tmp_path.glob("slurm-*.out"):
            text = path.read_text()
            found |= dict.fromkeys(re.findall(rf"job {array.number}_(\d), attempt 1", text), text)
        return found

    def trained(log: str) -> list[int]:
        return [int(number) for number in re.findall(r"iteration +(\d+)/", log)]

    def training() -> bool:
        return len(logs()) == 3 and all(trained(log) for log in logs().values())

    def train_on() -> bool:
        return all(trained(log)[-1] > before[task] for task, log in logs().items())

    array.wait(training, "three tasks that train")
    own = (tmp_path / f"slurm-{array.number}.out").read_text()
    same = re.findall(rf"job {array.number}_(\d), ", own)[0]
    cluster.run("scancel", "--signal=USR1", "--batch", f"{array.number}_{same}")
    array.wait(lambda: "requeued, 1 of at most 20 times" in logs()[same], "the requeue")
    before = {task: trained(log)[-1] for task, log in logs().items()}
    array.wait(train_on, "three tasks that train on")
    for task, log in logs().items():
        assert ("attempt 2 on" in log) == (task == same)
        assert "DUE TO JOB REQUEUE" not in log or task == same
    resumed = trained(logs()[same].partition("attempt 2 on")[2])
    assert resumed[0] == before[same] + 1
    cluster.run("scancel", array.number)
    array.wait(lambda: cluster.run("squeue", "--noheader").strip() == "", "the end", 600)


def test_a_job_runs_what_was_submitted(cluster, tmp_path: Path) -> None:
    """Whatever becomes of the file, and without the submitter's environment on the nodes.

    SLURM may not requeue this one, and the body says so.
    """
    file, run_dir = tmp_path / "my.yaml", tmp_path / "run"
    file.write_text(
        "extends: tiny-s3\narguments: {lr: 2e-3, train_iters: 400, global_batch_size: 32}\n"
        "launch: {nodes: 2, nproc_per_node: 1, sbatch: {no-requeue: true, hold: true}}\n"
    )
    words = ["launch", file, "--slurm", "--run-dir", run_dir, "--set", "launch.environment.A_KEY=x"]
    given = {"SBATCH_EXPORT": "NONE", "VENV": "", "PREFLIGHT": "0"}
    megatron_s3 = [sys.executable, "-m", "megatron_s3.cli"]
    refused = cluster.run(*megatron_s3, *words, check=False, **given)
    assert "A_KEY: credentials are not written to the job's files" in refused
    number = cluster.run(*megatron_s3, *words[:-2], **given).split()[-1]
    file.write_text("extends: tiny-s3\n")
    cluster.run("scontrol", "release", number)
    job = Job(cluster, number, run_dir / f"slurm-{number}.out")
    job.wait_for("iteration +4/")
    cluster.run("scancel", "--signal=USR1", "--batch", number)
    assert job.wait_for_end() == "FAILED"
    assert re.match(
        r"stopped before the end, checkpoint 0 -> \d+; not requeued: SLURM refused it "
        r"\(.*disabled.*\); submit the same again to go on",
        job.said[-1],
    )
    assert "learning rate: 2.000000E-03" in job.log  # the last warmup iteration's
    origin = re.escape(f"  lr: 2e-3  # {file}:2")
    assert re.search(f"^{origin}$", (run_dir / "config.yaml").read_text(), re.MULTILINE)


def test_preflight_names_the_node_whose_disk_is_read_only(cluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    cluster.on(2, "mount", "--bind", str(run_dir), str(run_dir))
    cluster.on(2, "mount", "-o", "remount,bind,ro", str(run_dir))
    try:
        job = cluster.submit(run_dir, *TWO_NODES, options="--nodes=2")
        assert job.wait_for_end() == "FAILED"
    finally:
        cluster.on(2, "umount", str(run_dir))
    assert job.said[1:] == [
        f"node2: cannot write to {run_dir}: Read-only file system",
        "nothing trained: the preflight ended with status 1; see above for the node",
    ]


@pytest.mark.thorough
def test_preflight_names_the_nodes_without_gpus(cluster, tmp_path: Path) -> None:
    words = [*TWO_NODES, "--set", "plugin_device=cuda"]
    job = cluster.submit(tmp_path / "run", *words, options="--nodes=2")
    assert job.wait_for_end() == "FAILED"
    what = "has 0 GPUs, and the configuration needs 1 (launch.nproc_per_node)"
    assert job.said[1:3] == [f"node1: {what}", f"node2: {what}"]
    assert not job.attempts[0]


def test_preflight_names_the_node_with_a_dead_network(cluster, tmp_path: Path) -> None:
    # All but SLURM's own ports and the one at which the nodes meet.
    rule = "ipproto tcp sport 30000-59999 dport 30000-59999 blackhole".split()
    cluster.on(2, "ip", "rule", "add", *rule)
    try:
        words = [*TWO_NODES, "--set", "launch.nodes=3"]
        run = tmp_path / "run"
        job = cluster.submit(run, *words, options="--nodes=3", PREFLIGHT_TIMEOUT="10")
        assert job.wait_for_end() == "FAILED"
    finally:
        cluster.on(2, "ip", "rule", "del", *rule)
    assert job.said[1] == "node2: no all-reduce with any other node"
    assert not job.attempts[0]


def test_time_limit_saves_requeues_and_resumes(cluster, tmp_path: Path) -> None:
    words = [*TWO_NODES, *SLOW, "--set", "train_iters=5000"]
    job = cluster.submit(tmp_path / "run", *words, options="--nodes=2 --time=10")
    job.wait_for("iteration +1/")
    # Of the 180 s of --signal 120 to 180 are left now: SLURM sends it when it looks next.
    limit = (job.seconds + 180) // 60
    cluster.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={limit}")
    saved = int(job.wait_for(r"stopped before the end, checkpoint 0 -> (\d+); requeued, 1 of at"))
    assert "received USR1" in job.log
    job.wait(lambda: job.state == "PENDING", "the requeue")
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=10")
    last = saved + 4
    job.wait_for(rf"iteration +{last}/")
    # Save and stop for good.
    cluster.run("scancel", "--signal=TERM", "--batch", job.number)
    assert job.wait_for_end() == "FAILED"
    assert "not requeued after TERM" in job.said[-1]
    first, second = job.attempts
    assert min(second) == saved + 1

    unbroken = cluster.submit(
        *[tmp_path / "unbroken", *words, "--set", f"exit_interval={last}"],
        options="--nodes=2",
        MAX_REQUEUES="0",
        **QUICK,
    )
    assert unbroken.wait_for_end() == "FAILED"
    assert unbroken.said[-1].endswith("not requeued: 0 times already, MAX_REQUEUES is 0")
    (reference,) = unbroken.attempts
    broken = first | second
    both = sorted(set(reference) & set(broken))
    assert {saved, saved + 1, last} <= set(both)
    assert [broken[i] for i in both] == [reference[i] for i in both]


@pytest.mark.thorough
def test_dead_node_is_replaced_and_training_goes_on(cluster, tmp_path: Path) -> None:
    """Last, because the node stays dead."""
    words = [*TWO_NODES, *SLOW, "--set", "save_interval=10"]
    job = cluster.submit(tmp_path / "run", *words, options="--nodes=2", **QUICK)
    job.wait_for("iteration +12/")
    cluster.power_off(2)
    assert job.wait_for_end() == "COMPLETED"
    assert job.said[-1] == "finished at checkpoint 30"
    assert "attempt 2 on node1,node3" in job.log
    first, second = job.attempts
    assert min(second) == 11
    again = sorted(set(first) & set(second))
    assert 11 in again and [first[i] for i in again] == [second[i] for i in again]
