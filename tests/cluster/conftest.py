"""A SLURM cluster of three nodes on this machine, started once, and ended with the tests."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.runs import Run

REPOSITORY = Path(__file__).parents[2]
BODY = REPOSITORY / "scripts" / "pretrain.sbatch"
NODES = 3
_OF_THE_CLUSTER = re.compile(
    r"\s*\d+ (munged|slurmctld|: slurmscriptd|slurmd -N|unshare --mount|sleep 3600|cat$|ps -e|"
    r"bash -c (node|echo ready)|bash \S+/with_cluster.sh )"
)


class Cluster:
    """Commands in the cluster.

    Attributes:
        folder: of its logs and state.
        first: PID, here, of its first process.
    """

    def __init__(self, folder: Path, first: int) -> None:
        self.folder, self.first = folder, first

    def run(self, *command: str | Path, check: bool = True, **environment: str) -> str:
        """Runs a command on the controller, in the repository; returns its output."""
        inside = ["nsenter", "-t", str(self.first), "--mount", "--pid", "--net", "--uts"]
        done = subprocess.run(
            [*inside, "env", "-C", REPOSITORY, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            env={
                "PATH": os.environ["PATH"],
                "HOME": os.environ.get("HOME", "/"),
                "SLURM_CONF": str(self.folder / "etc" / "slurm.conf"),
                "VENV": sys.prefix,
                "PYTHONPATH": str(REPOSITORY),
                "OMP_NUM_THREADS": "1",
                **environment,
            },
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}"
        return done.stdout

    def on(self, node: int, *command: str) -> str:
        """Runs a command on a node."""
        first = (self.folder / "run" / f"node{node}.pid").read_text().strip()
        return self.run("nsenter", "-t", first, "--mount", "--pid", "--net", "--uts", *command)

    def power_off(self, node: int) -> None:
        """Ends all that runs on a node at once, and its network."""
        self.run("kill", "-9", (self.folder / "run" / f"node{node}.pid").read_text().strip())

    def submit(self, run_dir: Path, *words: str, options: str = "", **environment: str) -> "Job":
        """Submits the shipped body; ``options`` are sbatch's."""
        run_dir.mkdir(parents=True, exist_ok=True)
        log = f"--output={run_dir}/slurm-%j.out"
        printed = self.run(
            *["sbatch", "--parsable", log, *options.split(), BODY, *words],
            **{"RUN_DIR": str(run_dir), **environment},
        )
        number = printed.split()[-1]
        return Job(self, number, run_dir / f"slurm-{number}.out")

    def processes(self) -> list[str]:
        """What runs in the cluster beside itself."""
        lines = self.run("ps", "-e", "-o", "pid=,args=").splitlines()
        return [line for line in lines if not _OF_THE_CLUSTER.match(line)]


class Job:
    """A submitted job, by its number, and what it printed."""

    def __init__(self, cluster: Cluster, number: str, output: Path) -> None:
        self.cluster, self.number, self.output = cluster, number, output

    @property
    def log(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    @property
    def said(self) -> list[str]:
        """Lines of the body and of the preflight."""
        return re.findall(r"^(?:\[pretrain.sbatch\] \S+ \S+|preflight:) (.*)", self.log, re.M)

    @property
    def attempts(self) -> list[dict[int, str]]:
        """Losses as printed (7 digits) by iteration, of each attempt.

        Without the second line of each, for which Megatron prints the mean of two iterations.
        """
        parts = re.split(r"^\[pretrain.sbatch\] .* attempt \d+ on .*", self.log, flags=re.M)[1:]
        return [Run(0, part).losses for part in parts]

    @property
    def state(self) -> str:
        shown = self.cluster.run("scontrol", "show", "job", self.number)
        return re.findall(r"JobState=(\S+)", shown)[0]

    @property
    def seconds(self) -> int:
        """The time for which its present attempt has run."""
        shown = self.cluster.run("scontrol", "show", "job", self.number)
        hours, minutes, seconds = re.findall(r"RunTime=(\d+):(\d+):(\d+)", shown)[0]
        return int(hours) * 3600 + int(minutes) * 60 + int(seconds)

    def wait(self, what: Callable[[], object], why: str, seconds: float = 180) -> None:
        """Waits until something is true; no test is about how long that takes."""
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"{why}: not yet\n{self.log[-6000:]}"
            time.sleep(0.3)

    def wait_for(self, pattern: str) -> str:
        """Waits for a line of the log; returns its first group."""
        self.wait(lambda: re.search(pattern, self.log), pattern)
        return [*re.findall(pattern, self.log), ""][0]

    def wait_for_end(self) -> str:
        """Waits until the job has left the queue; returns its state."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait(lambda: self.state in ended, "the end of the job")
        return self.state


def _child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


@pytest.fixture(scope="session")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    needed = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "nsenter", "ip")
    missing = [name for name in needed if not shutil.which(name)]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: install slurmctld, slurmd, slurm-client, munge")
    if os.geteuid():
        pytest.skip("a cluster in namespaces of its own needs root")
    if subprocess.run(["unshare", "--mount", "--pid", "--net", "--fork", "true"]).returncode:
        pytest.skip("this machine allows no namespaces")
    folder = tmp_path_factory.mktemp("cluster")
    script = Path(__file__).parent / "with_cluster.sh"
    # It ends when its input does, with this process at the latest.
    process = subprocess.Popen(
        [script, str(NODES), folder, "bash", "-c", "echo ready; cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "ready\n", "the cluster did not start; see above"
        yield Cluster(folder, _child(_child(process.pid)))
        process.stdin.close()


@pytest.fixture
def cluster(_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster; after the test nothing of its jobs may run on."""
    yield _cluster
    _cluster.run("scancel", "--user=root")
    left = _cluster.processes()
    deadline = time.monotonic() + 20
    while left and time.monotonic() < deadline:
        time.sleep(0.5)
        left = _cluster.processes()
    assert not left, "orphans:\n" + "\n".join(left)
