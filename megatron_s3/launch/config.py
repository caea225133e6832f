"""Run configurations: YAML files that extend one another. Each value keeps its origin.

A file is a mapping with these optional keys::

    extends: models/gpt2-7b.yaml    # a path beside this file, or a list of them; read first
    over: gpt2-7b-s3.yaml           # the same, where this file is the first one: what an overlay
                                    # is meant for
    arguments:                      # Megatron's flags by name; true is the bare flag, false or
      optimizer: s3                 # null takes an inherited one away, a list is several words
      lr: 3e-3
    derived:                        # computed where the arguments do not give the value themselves
      lr_times_weight_decay: 3e-5   # weight_decay = 3e-5 / lr
      min_lr_over_lr: 0.1           # min_lr = 0.1 * lr
    launch:
      nodes: 8
      nproc_per_node: 8             # ranks on a node: one for each GPU
      script: pretrain_gpt.py       # of a Megatron-LM checkout; else megatron_s3.pretrain_gpt
      time: "24:00:00"              # SLURM's time limit
      environment: {NAME: value}    # for every rank
      sbatch: {partition: batch}    # further options of sbatch; null takes a default one away
    array:                          # as many runs, each in a folder of its own
      lr: [1e-3, 3e-3]              # (several keys: all combinations)
    dataset: PREFIX                 # what `megatron-s3 data` wrote, instead of --data-path

Later files override earlier ones, key by key, and ``--set`` overrides all files. If the optimizer
is replaced, the flags of the old one (``s3_beta``) are removed, and a log line names them.
"""

import difflib
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import yaml

from megatron_s3.errors import no_file
from megatron_s3.launch.config_paths import find, name_of
from megatron_s3.launch.redact import redact_word
from megatron_s3.launch.resolved import DERIVED, LAUNCH, Config, ConfigError, Launch, Origin, Value
from megatron_s3.log import tell_once
from megatron_s3.renamed import RENAMED, renamed

__all__ = ["COPY", "Config", "ConfigError", "load"]

#: First line of a copy that :meth:`Config.yaml` made for a job. The comment behind each value is
#: its original place, which errors and records then name.
COPY = "# A copy for a job; behind each value, its original place."


_SECTIONS = ("arguments", "derived", "launch", "array")
#: Keys of the section launch that hold keys of their own.
_TABLES = ("environment", "sbatch")

#: A value and its place.
Setting = tuple[Value, Origin]
#: Settings by ``dataset`` or ``SECTION.KEY``.
Settings = dict[str, Setting]


def load(files: Sequence[str], sets: Sequence[str] = ()) -> Config:
    """Reads files and overrides; later ones win.

    Args:
        files: paths or names of shipped configurations; the first gives the name.
        sets: ``KEY=VALUE`` words. KEY is an argument's name, ``dataset``, or ``SECTION.KEY``;
            VALUE is read as YAML.

    Raises:
        ConfigError: naming file, line, reason and remedy.
    """
    merged: Settings = {}
    try:
        for name in files:
            _read(*find(name), merged, ())
        for word in sets:
            _override(merged, dict([_set(word)]))
    except RecursionError:
        which = ", ".join([*files, *map(redact_word, sets)])
        raise ConfigError(f"{which}: a list is nested too deeply, or holds itself") from None
    return _resolve(name_of(files[0]), merged)


def _composed(path: Path, shown: str) -> tuple[str, yaml.Node | None]:
    """Returns the text of a file and its YAML; None if it is empty."""
    try:
        text = path.read_text(encoding="utf-8")
        return text, yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{shown}: cannot be read: {no_file(error)}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise ConfigError(f"{shown}:{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{shown}: not valid YAML: {error}") from error


def _read(path: Path, shown: str, merged: Settings, within: tuple[Path, ...]) -> None:
    """Merges a file, after those that it extends."""
    real = path.resolve()
    if real in within:
        raise ConfigError(f"{shown}: extends itself through {within[-1].name}")
    text, root = _composed(path, shown)
    if root is None:
        return
    entries = list(_entries(root, shown, "the file"))
    for key, node, origin in entries:
        if key == "extends" or (key == "over" and not merged):
            bases = _value(node, origin, key)
            for base in bases if isinstance(bases, list) else [bases]:
                if not isinstance(base, str):
                    raise ConfigError(f"{origin}: {key} must be a file or a list of files")
                try:
                    target, name = find(base, path.parent)
                except ConfigError as error:
                    raise ConfigError(f"{origin}: {key}: {error}") from None
                # The run that an overlay is meant for may contain the same overlay.
                _read(target, name, merged, within if key == "over" else (*within, real))
    read: Settings = {}
    for key, node, origin in entries:
        _known(key, ("extends", "over", *_SECTIONS, "dataset"), origin, "key")
        if key == "dataset":
            read[key] = (_value(node, origin, key), origin)
        elif key in _SECTIONS:
            read |= dict(_section(key, node, origin.source))
    if text.startswith(COPY):
        lines = text.split("\n")
        read = {k: (v, _given_at(lines[o.line - 1], o)) for k, (v, o) in read.items()}
    _override(merged, read)


def _section(section: str, node: yaml.Node, shown: str) -> Iterator[tuple[str, Setting]]:
    """Yields the settings of a section of a file, with their keys.

    Raises:
        ConfigError: a key is unknown, or is given in two spellings.
    """
    seen: dict[str, tuple[str, int]] = {}
    for name, inner, origin in _entries(node, shown, section):
        if section == "launch" and name in _TABLES:
            for entry, value, place in _entries(inner, shown, f"launch.{name}"):
                setting = _value(value, place, entry, f"launch.{name}"), place
                yield f"launch.{name}.{entry}", setting
        else:
            key = _key(section, name, origin)
            if key in seen:
                other, line = seen[key]
                raise ConfigError(
                    f"{origin}: {name} is already set in line {line}, as {other}; remove one of "
                    "them"
                )
            seen[key] = name, origin.line
            yield key, (_value(inner, origin, name, section), origin)


def _override(merged: Settings, read: Settings) -> None:
    """Merges later settings; the flags of an optimizer that they replace are removed and logged."""
    key = "arguments.optimizer"
    if key in read and key in merged and read[key][0] != merged[key][0]:
        _remove_flags(merged, merged[key][0], *read[key])
    merged |= read


def _remove_flags(merged: Settings, old: Value, new: Value, origin: Origin) -> None:
    # If --set gives flags of another optimizer, that is a contradiction, and the check rejects it.
    owned = [
        name
        for name, (_, given) in merged.items()
        if name.startswith(f"arguments.{old}_") and given.line
    ]
    if owned:
        places = ", ".join(f"{name.partition('.')[2]} ({merged[name][1]})" for name in owned)
        tell_once(f"{origin}: optimizer {new} replaces {old}; these flags are removed: {places}")
    for name in owned:
        del merged[name]


def _given_at(line: str, origin: Origin) -> Origin:
    """Returns the original place that a copy names behind a value."""
    place = line.partition("  # ")[2]
    if place.startswith("--set "):
        return Origin(place.removeprefix("--set "))
    source, colon, number = place.rpartition(":")
    return Origin(source, int(number)) if colon and number.isdecimal() else origin


def _entries(node: yaml.Node, shown: str, what: str) -> Iterator[tuple[str, yaml.Node, Origin]]:
    """Yields the keys of a mapping with their values and places.

    Raises:
        ConfigError: the node is not a mapping, or a key occurs twice.
    """
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1
        raise ConfigError(f"{shown}:{line}: {what} must be a mapping of keys to values")
    seen: dict[str, int] = {}
    for key_node, value in node.value:
        line = key_node.start_mark.line + 1
        key = key_node.value
        if not isinstance(key, str):
            raise ConfigError(f"{shown}:{line}: a key must be a word")
        if key in seen:
            raise ConfigError(
                f"{shown}:{line}: {key} is already set in line {seen[key]}; remove one of them"
            )
        seen[key] = line
        yield key, value, Origin(shown, line)


def _value(node: yaml.Node, origin: Origin, key: str, section: str = "") -> Value:
    """Returns a scalar as it is written (3e-3 stays 3e-3), a bool, None, or a list of words.

    Args:
        node: the YAML.
        origin: its place.
        key: its key, for messages.
        section: where it belongs. Only an array may hold lists; a variable of the environment is
            a word, also where YAML has another name for it (yes, off).
    """
    if isinstance(node, yaml.SequenceNode):
        if section != "array" and any(isinstance(item, yaml.SequenceNode) for item in node.value):
            raise ConfigError(f"{origin}: {key} must be a value or a list, not a list of lists")
        items = (_value(item, origin, key) for item in node.value)
        return ["null" if item is None else str(item) for item in items]
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{origin}: {key} must be a value or a list, not a mapping")
    if "\0" in node.value:
        raise ConfigError(f"{origin}: {key} holds the character NUL, which no program can be given")
    if node.tag == "tag:yaml.org,2002:null":
        return None
    if node.tag == "tag:yaml.org,2002:bool" and section != "launch.environment":
        return str(node.value).lower() in ("true", "yes", "on")
    return str(node.value)


def _known(key: str, known: Iterable[str], origin: Origin, what: str) -> None:
    if key in known:
        return
    near = difflib.get_close_matches(key, list(known), n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
    raise ConfigError(f"{origin}: unknown {what} {key!r}; {hint}")


def _key(section: str, name: str, origin: Origin) -> str:
    """Returns the key of a setting, under its present name.

    Raises:
        ConfigError: the section has no such key.
    """
    if section == "derived":
        _known(name, DERIVED, origin, "derived value")
    elif section == "launch":
        _known(name, LAUNCH, origin, "launch setting")
    else:
        name = name.replace("-", "_")
        if (new := RENAMED.get(name)) is not None:
            tell_once(renamed(f"{origin}: {name}", new))
            name = new
    return f"{section}.{name}"


def _set(word: str) -> tuple[str, Setting]:
    """Returns the key of a word of ``--set``, its value, and its place."""
    key, equals, text = word.partition("=")
    origin = Origin(word)
    if not equals or not key:
        raise ConfigError(f"{origin}: must have the form KEY=VALUE")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        # The problem without the text, which may hold a credential.
        problem = getattr(error, "problem", None) or type(error).__name__
        raise ConfigError(f"{origin}: not a valid YAML value: {problem}") from error
    if node is None or (node.tag == "tag:yaml.org,2002:null" and not node.value):
        raise ConfigError(
            f"{origin}: no value is given; {key}=null takes one away, and {key}='' is an empty one"
        )
    section, dot, name = key.partition(".")
    inside = "launch.environment" if key.startswith("launch.environment.") else section
    value = _value(node, origin, key, inside)
    if not dot and key != "dataset":
        key = _key("arguments", key, origin)
    elif dot and section not in _SECTIONS:
        raise ConfigError(f"{origin}: unknown section {section!r}; known: {', '.join(_SECTIONS)}")
    elif section == "launch" and name in _TABLES:
        raise ConfigError(f"{origin}: must have the form launch.{name}.NAME=VALUE")
    elif dot and not (section == "launch" and name.split(".")[0] in _TABLES):
        key = _key(section, name, origin)
    return key, (value, origin)


def _resolve(config: str, merged: Settings) -> Config:
    arguments: dict[str, str | bool | list[str]] = {}
    origins: dict[str, Origin] = {}
    launch = Launch()
    array: dict[str, list[str]] = {}
    dataset = None
    for key, (value, origin) in merged.items():
        section, _, name = key.partition(".")
        if name.startswith("sbatch.") and value in (None, False):
            launch.sbatch[name.removeprefix("sbatch.")] = None
        elif value is None or (value is False and section == "arguments"):
            continue
        elif section == "arguments":
            arguments[name] = value
        elif section == "array":
            array[name] = value if isinstance(value, list) else [str(value)]
        elif section == "launch":
            _set_launch(launch, name, value, origin)
        elif key == "dataset":
            if not isinstance(value, str) or not value:
                raise ConfigError(f"{origin}: dataset must be a prefix that megatron-s3 data wrote")
            dataset = value
        origins[key] = origin
    derived = _derive(arguments, merged, origins)
    return Config(config, arguments, launch, derived, array, dataset, origins)


def _set_launch(launch: Launch, key: str, value: Value, origin: Origin) -> None:
    table, dot, name = key.partition(".")
    if dot:
        if isinstance(value, list):
            raise ConfigError(f"{origin}: {key} must be one value")
        if table == "environment" and (not name or "=" in name or "\0" in name):
            raise ConfigError(f"{origin}: {name!r} cannot be the name of a variable")
        text = "" if value is True else str(value)
        getattr(launch, table)[name] = text
    elif key in ("time", "script"):
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{origin}: {key} must be one value")
        setattr(launch, key, value)
    else:
        if not isinstance(value, str) or not value.isdecimal() or int(value) < 1:
            raise ConfigError(
                f"{origin}: launch.{key} must be a whole number of at least 1, not {value!r}"
            )
        setattr(launch, key, int(value))


def _derive(
    arguments: dict[str, Any],
    merged: Settings,
    origins: dict[str, Origin],
) -> dict[str, str]:
    """Adds the derived arguments; returns the factors of those that are not given explicitly."""
    used = {}
    compute: Callable[[Decimal, Decimal], Decimal]
    for key, compute in (
        ("lr_times_weight_decay", operator.truediv),
        ("min_lr_over_lr", operator.mul),
    ):
        target = DERIVED[key]
        if f"derived.{key}" not in merged:
            continue
        value, origin = merged[f"derived.{key}"]
        if value is None or target in arguments:
            continue
        if "lr" not in arguments:
            raise ConfigError(f"{origin}: {key} needs arguments.lr, which no file sets")
        factor = _number(value, key, origin)
        lr = _number(arguments["lr"], "lr", merged["arguments.lr"][1])
        if lr <= 0:
            raise ConfigError(f"{merged['arguments.lr'][1]}: lr must be greater than 0, not {lr}")
        # Decimal, so that 3e-5 / 3e-4 is 0.1 and not 0.09999999999999999. All digits are kept,
        # because a resumed run compares them with those of `megatron-s3 convert`.
        arguments[target] = repr(float(compute(factor, lr)))
        origins[f"arguments.{target}"] = origin
        used[key] = str(value)
    return used


def _number(value: Value, key: str, origin: Origin) -> Decimal:
    try:
        number = Decimal(value) if isinstance(value, str) else Decimal("nan")
    except InvalidOperation:
        number = Decimal("nan")
    if not number.is_finite():
        raise ConfigError(f"{origin}: {key} must be a number, not {value!r}")
    return number
