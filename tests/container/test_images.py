"""The real instructions of the Dockerfile, on a base that stands in for NGC's (see images.py)."""

import importlib.metadata
import json
import subprocess

import pytest

from megatron_s3 import __version__
from megatron_s3.cli import VERBS
from tests.container.images import NGC, run

pytestmark = pytest.mark.container
ANYBODY = ("--read-only", "--user=4242:4242", "--tmpfs=/tmp")


def configuration(name):
    done = subprocess.run(["podman", "inspect", name], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)[0]["Config"]


def test_gpu_leaves_the_torch_of_the_base_alone(gpu_image):
    name, said = gpu_image
    torch = importlib.metadata.version("torch")
    assert f"torch {torch} and " in said and " packages of the base are as they were" in said
    done = run(name, "python3", "-m", "pip", "list", "--format=freeze")
    listed = done.stdout.splitlines()
    assert f"torch=={torch}" in listed
    assert {"megatron-core==0.19.2", f"megatron-s3=={__version__}"} <= set(listed)
    # Nothing of what the base has was installed a second time.
    line = next(line for line in said.splitlines() if line.startswith("added "))
    added = {word.partition("==")[0] for word in line.split()[1:]}
    assert {"megatron-core", "megatron-s3", "transformers", "lm-eval"} <= added
    assert not added & set(NGC)


def test_gpu_is_labelled_and_not_root(gpu_image):
    settings = configuration(gpu_image[0])
    labels = {
        key.removeprefix("org.opencontainers.image."): value
        for key, value in settings["Labels"].items()
    }
    assert labels["title"] == "megatron-s3"
    assert labels["version"] == __version__
    assert labels["revision"] == "0123abc"
    assert labels["source"] == "https://example.org/megatron-s3"
    assert settings["User"] == "10001"
    # What the build needed of this machine stayed outside.
    assert not [e for e in settings["Env"] if e.startswith("PIP_") and "constraint" not in e]


def test_gpu_starts_through_the_entry_point_of_the_base(gpu_image):
    done = run(gpu_image[0], "bash", "-c", "id -un; pwd; touch x && echo written")
    assert done.stdout.splitlines() == [
        "the banner of the base",
        "trainer",
        "/workspace",
        "written",
    ]


def test_gpu_has_a_command_line_for_every_verb(gpu_image):
    verbs = " ".join(VERBS)
    done = run(gpu_image[0], "bash", "-c", f"type -P {verbs}; megatron-s3 --version")
    assert done.stdout.splitlines()[1:] == [f"megatron-s3 {__version__}"]


def test_gpu_plans_a_launch_as_anybody_on_a_read_only_root(gpu_image, tmp_path):
    tmp_path.chmod(0o777)
    options = (*ANYBODY, f"--volume={tmp_path}:/workspace")
    done = run(gpu_image[0], "launch", "tiny-s3", "--dry-run", options=options)
    assert done.returncode == 0, done.stdout
    assert "--optimizer s3" in done.stdout and "torch.distributed.run" in done.stdout


#: From text to a Hugging Face model, as docker/README.md shows it, with the smallest model.
TEXT_TO_MODEL = """
set -e
megatron-s3-entrypoint data --input text.jsonl --output-prefix data/text
megatron-s3-entrypoint launch tiny-s3 --set dataset=data/text --set mock_data=false \
  --set tokenizer_type=null --set vocab_size=null --set train_iters=2 --set save_interval=2 \
  --set lr_warmup_iters=1 --set launch.nproc_per_node=1
megatron-s3-entrypoint export runs/tiny-s3/checkpoints model
python3 -c "import lm_eval.models.huggingface"  # the verb eval's; its tasks come from a hub
"""


def test_cpu_goes_from_text_to_an_exported_model_as_anybody(cpu_image, tmp_path):
    tmp_path.chmod(0o777)
    lines = (json.dumps({"text": f"The {n}th document of a few words. " * 20}) for n in range(100))
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    options = (*ANYBODY, f"--volume={tmp_path}:/workspace")
    done = run(cpu_image[0], "bash", "-c", TEXT_TO_MODEL, options=options)
    assert done.returncode == 0, done.stdout[-4000:]
    assert (tmp_path / "model" / "model.safetensors").stat().st_size > 1_000_000


@pytest.mark.thorough
def test_cpu_runs_the_quickstart_as_anybody_on_a_read_only_root(cpu_image, tmp_path):
    name, _ = cpu_image
    command = configuration(name)["Cmd"]
    assert command == ["python3", "-m", "megatron_s3.quickstart"]
    tmp_path.chmod(0o777)
    options = (*ANYBODY, f"--volume={tmp_path}:/workspace")
    done = run(name, *command, "--iters=10", "--nproc=1", options=options)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "validation loss" in done.stdout
    folder = tmp_path / "runs" / "quickstart"
    assert (folder / "loss.png").stat().st_size > 1000
    assert (folder / "s3" / "train.log").stat().st_uid == 4242
