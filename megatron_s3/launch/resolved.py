"""A configuration, resolved: its arguments, and the place that each value came from."""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from megatron_s3.errors import MegatronS3Error
from megatron_s3.launch.redact import is_secret, redact, redact_word

__all__ = [
    "DERIVED",
    "LAUNCH",
    "Config",
    "ConfigError",
    "Launch",
    "Origin",
    "Value",
    "refuse_credentials",
]


Value = str | bool | None | list[str]


#: What is derived, and the argument that it gives.
DERIVED = {"lr_times_weight_decay": "weight_decay", "min_lr_over_lr": "min_lr"}


#: The keys of the section launch.
LAUNCH = ("nodes", "nproc_per_node", "script", "time", "environment", "sbatch")


class ConfigError(MegatronS3Error, ValueError):
    """A configuration that cannot be run; the message names file, line, reason and remedy.

    What looks like a credential in it is left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


@dataclass(frozen=True)
class Origin:
    """The place at which a value was given.

    Attributes:
        source: the file as the user named it, or the ``--set`` word.
        line: counted from 1; 0 for ``--set``.
    """

    source: str
    line: int = 0

    def __str__(self) -> str:
        text = f"{self.source}:{self.line}" if self.line else f"--set {redact_word(self.source)}"
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass
class Launch:
    """The settings of where the ranks run.

    Attributes:
        nodes: number of machines.
        nproc_per_node: ranks on each: one for each GPU.
        script: a training script of Megatron-LM's; None for :mod:`megatron_s3.pretrain_gpt`.
        time: SLURM's time limit, as sbatch takes it; None for the partition's own.
        environment: variables set for every rank.
        sbatch: further long options of sbatch, without dashes; "" for one without a value, None
            for a default one that is not wanted.
    """

    nodes: int = 1
    nproc_per_node: int = 1
    script: str | None = None
    time: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    sbatch: dict[str, str | None] = field(default_factory=dict)


@dataclass
class Config:
    """A configuration, resolved.

    Attributes:
        name: the first file's, without its ending.
        arguments: Megatron's, by the names of their flags with underscores; flags without a value
            are True. Derived ones included, those that the dataset brings not.
        launch: nodes, ranks, environment.
        derived: the factors that some of the arguments were computed from.
        array: values of arguments for as many runs; empty for one run.
        dataset: prefix of what ``megatron-s3 data`` wrote, or None.
        origins: where each value was given, by ``section.key``.
    """

    name: str
    arguments: dict[str, str | bool | list[str]]
    launch: Launch
    derived: dict[str, str]
    array: dict[str, list[str]]
    dataset: str | None
    origins: dict[str, Origin]

    @property
    def world_size(self) -> int:
        """Returns the number of ranks."""
        return self.launch.nodes * self.launch.nproc_per_node

    def words(self) -> list[str]:
        """Returns Megatron's command line."""
        words = []
        for name, value in self.arguments.items():
            words.append(_flag(name))
            if isinstance(value, list):
                words += value
            elif value is not True:
                words.append(str(value))
        return words

    def where(self, name: str) -> str:
        """Returns where argument ``name`` was given, for messages."""
        origin = self.origins.get(f"arguments.{name}")
        return str(origin) if origin else "a default"

    def yaml(self, whole: bool = False) -> str:
        """Returns the resolved configuration as YAML, each value with the place it came from.

        In place of a credential there is a comment, and the ranks have to get it from the
        environment.

        Args:
            whole: the array too, and in place of what is derived the factors: what a job of all
                these runs is made from.
        """
        derived = {DERIVED[key] for key in self.derived} if whole else set()
        sections: dict[str, Any] = {
            "arguments": {k: v for k, v in self.arguments.items() if k not in derived},
            "derived": self.derived if whole else {},
            "launch": {name: getattr(self.launch, name) for name in LAUNCH},
            "array": self.array if whole else {},
        }
        if self.dataset:
            sections["dataset"] = self.dataset
        return "\n".join(self._lines("", sections, "")) + "\n"

    def _lines(self, within: str, values: dict[str, Any], indent: str) -> list[str]:
        lines = []
        for name, value in values.items():
            key = f"{within}.{name}".lstrip(".")
            if isinstance(value, dict):
                inner = self._lines(key, value, indent + "  ")
                if any(not line.lstrip().startswith("#") for line in inner):
                    lines.append(f"{indent}{name}:")
                lines += inner
            elif value is not None or within == "launch.sbatch":
                if self._is_secret(key, name, value):
                    lines.append(f"{indent}# {name}: a credential, which is not written down")
                    continue
                origin = self.origins.get(key)
                place = f"  # {origin}" if origin else ""
                lines.append(f"{indent}{_text(name)}: {_text(value)}{place}")
        return lines

    @staticmethod
    def _is_secret(key: str, name: str, value: Any) -> bool:
        if key.startswith("launch.environment."):
            return is_secret(name, value)
        texts = value if isinstance(value, list) else [value]
        return any(isinstance(text, str) and redact_word(text) != text for text in texts)


def refuse_credentials(config: Config) -> None:
    """Refuses a credential where it cannot be kept out of files.

    Raises:
        ConfigError: an argument of Megatron's looks like one.
    """
    for name, value in config.arguments.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and redact(text) != text:
                raise ConfigError(
                    f"{config.where(name)}: {name} looks like a credential, or like a URL with one "
                    f"({redact(text)}): Megatron prints its arguments and saves them in each "
                    "checkpoint; give it to the ranks by launch.environment or by a file"
                )


def _text(value: Any) -> str:
    """Returns a value as YAML that :func:`load` reads the same: on one line, without #."""
    if isinstance(value, list):
        return "[" + ", ".join(_text(item) for item in value) + "]"
    if value is None:
        return "null"
    if value is True:
        return "true"
    plain = re.fullmatch(r"[A-Za-z0-9_./][A-Za-z0-9_./+-]*", str(value))
    spoken_for = str(value).lower() in ("true", "false", "yes", "no", "on", "off", "null", "~")
    if plain and not spoken_for:
        return str(value)
    quoted = yaml.safe_dump(str(value), default_style='"', width=float("inf")).rstrip("\n")
    return quoted.replace("#", "\\x23")


def _flag(name: str) -> str:
    # The one spelling of Megatron's with an underscore in it.
    return "--" + name.replace("_", "-").replace("opt-param-scheduler", "opt_param-scheduler")
