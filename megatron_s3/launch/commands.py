"""The command lines of a run: Megatron's, and the one that starts the ranks."""

import os
import shlex
import sys
from pathlib import Path

from megatron_s3.launch.config import Config, ConfigError
from megatron_s3.launch.content import LISTS, cache_folder
from megatron_s3.launch.progress import load_folder, save_folder

__all__ = ["MEETING", "first_node", "megatron_words", "shell_word", "torchrun"]

#: Megatron's arguments that name the training data.
_DATA = ("data_path", "train_data_path", "mock_data", *LISTS)

#: torchrun's options for the rendezvous of the nodes, and the variables with their values.
MEETING = {
    "node-rank": "SLURM_NODEID",
    "master-addr": "MASTER_ADDR",
    "master-port": "MASTER_PORT",
}


def first_node() -> bool:
    """Returns whether this node is the first of the job, which writes logs and records for all."""
    return os.environ.get("SLURM_NODEID", "0") == "0"


def megatron_words(config: Config, run_dir: Path) -> list[str]:
    """Returns Megatron's command line for a run, with its dataset and its folders.

    Raises:
        ConfigError: no data are given, the dataset does not exist, or a folder has no name.
    """
    words = config.words()
    given = config.arguments
    if config.dataset:
        from megatron_s3 import data

        try:
            words += data.megatron_arguments(config.dataset)
        except data.DataError as error:
            raise ConfigError(f"{config.origins['dataset']}: dataset: {error}") from error
    elif given.keys().isdisjoint(_DATA):
        raise ConfigError(
            f"{config.name}: no data to train on; set dataset=PREFIX to use what `megatron-s3 "
            "data` wrote (or data_path=PREFIX for a dataset of Megatron, or mock_data=true)"
        )
    for name, folder in {
        "save": save_folder(config, run_dir),
        "load": load_folder(config, run_dir),
        "tensorboard_dir": run_dir.absolute() / "tensorboard",
        "data_cache_path": cache_folder(config, run_dir),
    }.items():
        if given.get(name) == "":
            raise ConfigError(
                f"{config.where(name)}: {name} is empty; name a folder, or leave it out to use "
                f"{folder}"
            )
        if name not in given:
            words += ["--" + name.replace("_", "-"), str(folder)]
    return words


def torchrun(config: Config, words: list[str]) -> list[str]:
    """Returns the command that starts this node's ranks."""
    launch = config.launch
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += [f"--nproc-per-node={launch.nproc_per_node}"]
    if launch.nodes == 1:
        # The address, because a container's host name may not resolve.
        command += ["--standalone", "--local-addr=127.0.0.1"]
    else:
        command += [f"--nnodes={launch.nodes}"]
        for option, name in MEETING.items():
            command += [f"--{option}={os.environ.get(name) or f'${name}'}"]
    program = ["megatron_s3", launch.script] if launch.script else ["megatron_s3.pretrain_gpt"]
    return [*command, "-m", *program, *words]


def shell_word(word: str) -> str:
    """Returns a word of :func:`torchrun` for a shell, which fills in the meeting place of a job."""
    option, _, name = word.partition("=$")
    if MEETING.get(option.removeprefix("--")) == name:
        return f'{option}="${name}"'
    return shlex.quote(word)
