"""scripts/pretrain.sbatch trains in the image on two nodes of a real SLURM cluster.

No Apptainer is here: a program of its name gives podman what the script gives Apptainer. As that
would, it runs the image as the user who calls, with a root that cannot be written.
"""

import shlex
import shutil
import subprocess

import pytest

from tests.container.images import ROOT, run_words

pytestmark = [pytest.mark.container, pytest.mark.cluster]

APPTAINER = """#!/usr/bin/env bash
set -euo pipefail
volumes=() pwd=""
case $1 in
  exec) entry=(--entrypoint= --env=HOME=/tmp) ;;  # the user's, with Apptainer
  run) entry=() ;;
esac
shift
while [ $# -gt 0 ]; do
  case $1 in
    --nv) shift ;;
    --bind) IFS=, read -ra folders <<<"$2"; volumes+=("${folders[@]/#/--volume=}"); shift 2 ;;
    --pwd) pwd=$2; shift 2 ;;
    *) shift; break ;;
  esac
done
exec RUN "${entry[@]}" "${volumes[@]}" --workdir="$pwd" IMAGE "$@"
"""

# Waits for the job, whose output is the answer.
SUBMIT = """
job=$(sbatch --parsable --nodes=2 --output=out.txt --export=ALL,PREFLIGHT=0 "$@")
while squeue --noheader --jobs="$job" 2>/dev/null | grep -q .; do sleep 0.5; done
scontrol show job "$job" | grep -o 'JobState=[A-Z]*'
"""


def test_two_nodes_train_in_the_image(gpu_image, tmp_path):
    if missing := [t for t in ("slurmctld", "slurmd", "munged", "ip") if not shutil.which(t)]:
        pytest.skip(f"no cluster can be made here; not installed: {' '.join(missing)}")
    work = tmp_path / "work"
    work.mkdir()
    work.chmod(0o777)
    options = (
        "--read-only", "--user=4242:4242", "--tmpfs=/tmp",
        "--env=SLURM_*", "--env=MASTER_*",
    )  # fmt: skip
    *podman, image = run_words(gpu_image[0], options=options)
    program = tmp_path / "bin" / "apptainer"
    program.parent.mkdir()
    program.write_text(APPTAINER.replace("RUN", shlex.join(podman)).replace("IMAGE", image))
    program.chmod(0o755)
    sets = ("launch.nodes=2", "launch.nproc_per_node=1", "train_iters=4", "save_interval=4")
    done = subprocess.run(
        [
            ROOT / "tests/cluster/with_cluster.sh", "2", tmp_path / "cluster",
            "env", f"PATH={program.parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "CONTAINER=apptainer:s3.sif",
            "bash", "-euc", SUBMIT, "submit", ROOT / "scripts/pretrain.sbatch", "tiny-s3",
            *(word for key in sets for word in ("--set", key)),
        ],
        cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    output = (work / "out.txt").read_text() if (work / "out.txt").exists() else ""
    assert "JobState=COMPLETED" in done.stdout, done.stdout + output
    assert "iteration        4/       4" in output
    assert "2 ranks on 2 nodes" in output
    assert "finished at checkpoint 4" in output
    folder = work / "runs" / "tiny-s3"
    assert (folder / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "4"
    assert (folder / "config.yaml").stat().st_uid == 4242
