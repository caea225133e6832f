"""Progress of a run: where it saves, its newest complete checkpoint, and its end.

The launcher, the preflight and the job's script use it. It imports neither torch nor Megatron.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_s3.launch.check import iterations
from megatron_s3.launch.config import Config, ConfigError, load
from megatron_s3.storage import newest
from megatron_s3.storage.layout import TRACKER, has_config

__all__ = [
    "Progress",
    "continued",
    "load_folder",
    "progress",
    "refuse_another",
    "save_folder",
]

#: Arguments about the start of a run, and a condition under which they are allowed when the run
#: resumes from its own checkpoints. Otherwise the same command would start over each time.
_START = {
    "finetune": None,
    "ckpt_step": None,
    "no_load_optim": "no_save_optim",
    "no_load_rng": "no_save_rng",
}


@dataclass(frozen=True)
class Progress:
    """The progress of a run.

    Attributes:
        folder: where its checkpoints are written.
        saved: iteration of the newest complete checkpoint there; None if there is none.
        last: iteration at which training is finished; None if nothing trains (``skip_train``).
    """

    folder: Path
    saved: int | None
    last: int | None

    @property
    def finished(self) -> bool:
        """Whether training has reached its end and has saved a checkpoint there."""
        return self.last is not None and (self.saved or 0) >= self.last


def progress(config: Config, run_dir: Path) -> Progress:
    """Returns how far the run of a configuration is.

    Args:
        config: the configuration of the run.
        run_dir: the run's folder.

    Raises:
        ConfigError: the configuration does not say how long to train, its checkpoints are outside
            of a file system, or the record of the newest complete one is damaged.
    """
    folder = save_folder(config, run_dir)
    saved = _newest(folder, config)
    if config.arguments.get("non_persistent_ckpt_type") == "global":
        own = config.arguments.get("non_persistent_global_ckpt_dir")
        other = _newest(Path(str(own)) if own else folder / "non_persistent", config)
        saved = max((n for n in (saved, other) if n is not None), default=None)
    last = None if config.arguments.get("skip_train") else iterations(config)
    return Progress(folder, saved, last)


def save_folder(config: Config, run_dir: Path) -> Path:
    """Returns where a run's checkpoints are written.

    Raises:
        ConfigError: it is not a folder of a file system.
    """
    given = str(config.arguments.get("save", run_dir.absolute() / "checkpoints"))
    if "://" in given:
        raise ConfigError(
            f"{config.where('save')}: save is {given}, and the launcher can read only folders; "
            "name a folder"
        )
    return Path(given)


def load_folder(config: Config, run_dir: Path) -> Path:
    """Returns where a run without checkpoints starts: ``load``, or the folder where it saves.

    Raises:
        ConfigError: as :func:`save_folder`.
    """
    given = config.arguments.get("load")
    return Path(str(given)) if given else save_folder(config, run_dir)


def continued(config: Config, run_dir: Path) -> tuple[Config, list[str]]:
    """Returns the configuration for the ranks, with which the same command always resumes.

    ``load`` of another folder, and the arguments that belong to it, apply until the run has saved a
    checkpoint; after that it loads its own.

    Returns:
        The configuration for the ranks, and the names of the arguments that no longer apply.

    Raises:
        ConfigError: an argument would start the run over at each start.
    """
    given = config.arguments
    start = [n for n, unless in _START.items() if n in given and not given.get(unless or "")]
    folder = save_folder(config, run_dir)
    if load_folder(config, run_dir).absolute() == folder.absolute():
        if start:
            raise ConfigError(_again(config, start[0], folder))
        return config, []
    if _newest(folder, config) is None:
        return config, []
    left_out = ["load", *start]
    kept = {name: value for name, value in given.items() if name not in left_out}
    return replace(config, arguments=kept), left_out


def _again(config: Config, name: str, folder: Path) -> str:
    instead = {
        "finetune": (
            "name the checkpoint to start from with pretrained_checkpoint=DIR and leave finetune "
            "out, or with load=DIR, another folder than that"
        ),
        "ckpt_step": f"write the iteration into {folder / TRACKER} instead, once",
    }.get(name, f"start once from there in another folder: --run-dir NEW, load={folder}")
    return (
        f"{config.where(name)}: {name} would apply at each start, also when the run resumes from "
        f"its checkpoints in {folder}: {instead}"
    )


def refuse_another(config: Config, run_dir: Path) -> bool:
    """Compares a finished run's ``config.yaml`` with the current configuration.

    Returns:
        Whether there was a configuration to compare with.

    Raises:
        ConfigError: the finished run had another configuration.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        return False
    other = "use another --run-dir for another run"
    try:
        then = load([str(path)])
    except ConfigError as error:
        raise ConfigError(
            f"training in {run_dir} is finished, and its configuration cannot be read: {error}; "
            f"{other}"
        ) from error
    old, new = ({**each.arguments, "dataset": each.dataset} for each in (then, config))
    changed = [
        f"{name}: {_text(old.get(name))} -> {_text(new.get(name))}"
        for name in (old | new)
        if _value(old.get(name)) != _value(new.get(name))
    ]
    if changed:
        raise ConfigError(
            f"training in {run_dir} is finished, with another configuration: "
            f"{', '.join(changed)}; {other}"
        )
    return True


def _text(value: str | bool | list[str] | None) -> str:
    return "not given" if value is None else str(value)


def _value(value: str | bool | list[str] | None) -> object:
    """Returns a value in the form in which it is compared: 3e-3 and 0.003 are equal."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _newest(folder: Path, config: Config) -> int | None:
    """Returns the iteration of the newest complete checkpoint in a folder, as the ranks find it."""
    try:
        found = newest.newest(folder, config=has_config(config.arguments.get("ckpt_format")))
    except newest.Unclear as error:
        there = ", ".join(map(str, newest.saved(folder))) or "none"
        raise ConfigError(
            f"{error}; write the number of one of these iterations into it: {there}"
        ) from error
    except OSError as error:
        raise ConfigError(f"{folder / TRACKER} cannot be read: {error.strerror}") from error
    return found if isinstance(found, int) else None
