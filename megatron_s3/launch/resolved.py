"""A resolved configuration: its arguments, and the origin of each value."""

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
    "as_yaml",
    "refuse_credentials",
]


Value = str | bool | None | list[str]


#: Derived values, and the argument that each determines.
DERIVED = {"lr_times_weight_decay": "weight_decay", "min_lr_over_lr": "min_lr"}


#: The keys of the section launch.
LAUNCH = ("nodes", "nproc_per_node", "script", "time", "environment", "sbatch")


class ConfigError(MegatronS3Error, ValueError):
    """Raised if a configuration cannot run; the message names file, line, reason and remedy.

    Everything that looks like a credential is replaced in it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


@dataclass(frozen=True)
class Origin:
    """The place at which a value was given.

    Attributes:
        source: the file as the user named it, or the word of ``--set``.
        line: line number from 1; 0 for ``--set``.
    """

    source: str
    line: int = 0

    def __str__(self) -> str:
        text = f"{self.source}:{self.line}" if self.line else f"--set {redact_word(self.source)}"
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass
class Launch:
    """The settings of the machines on which the ranks run.

    Attributes:
        nodes: number of machines.
        nproc_per_node: ranks on each: one for each GPU.
        script: a training script of Megatron-LM; None for :mod:`megatron_s3.pretrain_gpt`.
        time: SLURM's time limit in sbatch's format; None for the partition's default.
        environment: environment variables for every rank.
        sbatch: further long options of sbatch, without dashes; "" for one without a value, None to
            remove a default one.
    """

    nodes: int = 1
    nproc_per_node: int = 1
    script: str | None = None
    time: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    sbatch: dict[str, str | None] = field(default_factory=dict)


@dataclass
class Config:
    """A resolved configuration.

    Attributes:
        name: name of the first file, without its ending.
        arguments: Megatron's arguments by the names of their flags, with underscores; flags without
            a value are True. Derived arguments are included, those of the dataset are not.
        launch: nodes, ranks and environment.
        derived: the factors from which arguments were computed.
        array: lists of values of arguments, for several runs; empty for one run.
        dataset: prefix that ``megatron-s3 data`` wrote, or None.
        origins: the origin of each value, by ``section.key``.
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
        """The number of ranks."""
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
        """Returns the origin of an argument, or of a key of another section, for messages."""
        origin = self.origins.get(name if "." in name else f"arguments.{name}")
        return str(origin) if origin else "a default"

    def yaml(self, whole: bool = False) -> str:
        """Returns the resolved configuration as YAML; a comment gives the origin of each value.

        A credential is replaced by a comment; the ranks must get it from the environment.

        Args:
            whole: whether to include the array, and the factors instead of derived values, as a job
                of all these runs needs them.
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
                    lines.append(f"{indent}# {name}: a credential, which is not recorded")
                    continue
                origin = self.origins.get(key)
                place = f"  # {origin}" if origin else ""
                lines.append(f"{indent}{as_yaml(name)}: {as_yaml(value)}{place}")
        return lines

    @staticmethod
    def _is_secret(key: str, name: str, value: Any) -> bool:
        if key.startswith("launch.environment."):
            return is_secret(name, value)
        texts = value if isinstance(value, list) else [value]
        return any(isinstance(text, str) and redact_word(text) != text for text in texts)


def refuse_credentials(config: Config) -> None:
    """Rejects a credential that could not be kept out of files.

    Raises:
        ConfigError: an argument of Megatron looks like a credential.
    """
    for name, value in config.arguments.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and redact(text) != text:
                raise ConfigError(
                    f"{config.where(name)}: {name} looks like a credential or a URL with one "
                    f"({redact(text)}), and Megatron prints its arguments and saves them in each "
                    "checkpoint; give it to the ranks in launch.environment or in a file"
                )


def as_yaml(value: Any) -> str:
    """Returns a value as YAML that :func:`load` reads back unchanged, on one line and without #."""
    if isinstance(value, list):
        return "[" + ", ".join(as_yaml(item) for item in value) + "]"
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
    # The only flag of Megatron with an underscore.
    return "--" + name.replace("_", "-").replace("opt-param-scheduler", "opt_param-scheduler")
