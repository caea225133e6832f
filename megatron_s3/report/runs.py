"""Finished and running runs, read from `metrics.jsonl` and, for experiments, `run.json`."""

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_s3.report.errors import RunError
from megatron_s3.telemetry import runlog

__all__ = ["RunError", "Suite", "Trained", "left_out", "load", "written"]

#: The numbers that a record of each kind holds; the first is whole.
_NUMBERS = {
    "start": ("iteration", "train_iters"),
    "train": ("iteration", "loss"),
    "valid": ("iteration", "loss"),
    "test": ("iteration", "loss"),
    "spike": ("onset", "height"),
}


@dataclass(frozen=True)
class Trained:
    """One training run.

    Attributes:
        folder: folder from which it was read.
        experiment: one of the paper's comparisons; "runs" for any other run.
        label: name in tables; runs of one label differ only in learning rate, seed and tags.
        optimizer: value of ``--optimizer``.
        lr: peak learning rate.
        seed: seed of initialisation and data order.
        tags: other values in which it differs from runs of its experiment.
        records: records of its log.
        damage: a warning for each line of its log that is cut off.
    """

    folder: Path
    experiment: str
    label: str
    optimizer: str
    lr: float
    seed: int
    tags: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]] = field(repr=False)
    damage: Sequence[str]

    @cached_property
    def start(self) -> Mapping[str, Any]:
        """The first record of the last launch, which may train longer than those before."""
        return _start(self.records)

    @cached_property
    def loss(self) -> list[tuple[int, float]]:
        """The iteration and training loss (nats per token) of each logged interval."""
        return [
            (r["iteration"], float(r["loss"]))
            for r in self.records
            if r["kind"] == "train" and r.get("loss") is not None
        ]

    @cached_property
    def valid(self) -> list[tuple[int, float]]:
        """The iteration and loss of each evaluation; the later of two at one iteration."""
        return sorted(
            {r["iteration"]: float(r["loss"]) for r in self.records if r["kind"] == "valid"}.items()
        )

    def update(self, name: str) -> list[tuple[int, float]]:
        """Returns iterations and a statistic of updates; empty without ``--plugin-log-updates``."""
        return [
            (r["iteration"], float(r["updates"]["all"][name]))
            for r in self.records
            if r["kind"] == "train" and r.get("updates")
        ]

    @property
    def largest(self) -> float | None:
        """The largest |u|, NaN if one was NaN; None without ``--plugin-log-updates``."""
        found = [value for _, value in self.update("max_abs")]
        return math.nan if any(map(math.isnan, found)) else max(found, default=None)

    @cached_property
    def intervals(self) -> list[tuple[float, float]]:
        """The tokens and seconds of an iteration, of each logged interval; NaN if unknown."""
        found: list[tuple[float, float]] = []
        before: Mapping[str, Any] = {}
        usual = math.nan
        for record in self.records:
            if record["kind"] == "start":
                sizes = (record.get("global_batch_size"), record.get("seq_length"))
                before, usual = {}, math.prod(size or math.nan for size in sizes)
            elif record["kind"] == "train":
                # A schedule may change the batch.
                iterations = record["iteration"] - before.get("iteration", math.inf)
                more = record.get("tokens", 0) - before.get("tokens", 0)
                tokens = more / iterations if iterations > 0 and more > 0 else usual
                found.append((tokens, record.get("seconds") or math.nan))
                before = record
        return found

    @cached_property
    def seconds(self) -> float:
        """The median seconds per iteration of the logged intervals; NaN before the second one."""
        timed = [seconds for _, seconds in self.intervals if not math.isnan(seconds)]
        return statistics.median(timed) if timed else math.nan

    @property
    def pace(self) -> float:
        """The median seconds per token of the logged intervals; NaN before the second one."""
        paces = [s / tokens for tokens, s in self.intervals if not math.isnan(s / tokens)]
        return statistics.median(paces) if paces else math.nan

    @property
    def spikes(self) -> list[Mapping[str, Any]]:
        """The records of loss spikes."""
        return [r for r in self.records if r["kind"] == "spike"]

    @property
    def bound(self) -> float | None:
        """The proven bound of |u|; None for an optimizer without one."""
        bound = self.start.get("bound")
        return None if bound is None else float(bound)

    @property
    def iterations(self) -> int:
        """The iterations of the whole schedule; those so far if the program did not tell them."""
        return int(self.start["train_iters"] or self.reached)

    @property
    def reached(self) -> int:
        """The last iteration logged."""
        return max((i for i, _ in self.loss[-1:] + self.valid[-1:]), default=0)

    @property
    def finished(self) -> bool:
        """Whether the run was trained to its end and evaluated there."""
        return bool(self.valid) and self.valid[-1][0] >= self.iterations

    @property
    def final(self) -> float:
        """The final validation loss; inf if it is not finite, NaN before the end of the run."""
        if not self.finished:
            return math.nan
        loss = self.valid[-1][1]
        return loss if math.isfinite(loss) else math.inf

    @property
    def test(self) -> float:
        """The final loss of the test text as :attr:`final`; NaN without a test."""
        tested = [
            float(r["loss"])
            for r in self.records
            if r["kind"] == "test" and r["iteration"] >= self.iterations
        ]
        if not (self.finished and tested):
            return math.nan
        return tested[-1] if math.isfinite(tested[-1]) else math.inf


@dataclass(frozen=True)
class Suite:
    """Runs that can be compared: one model, batch and length.

    Attributes:
        name: name of the folder; its path, with hyphens, if another suite has that name.
        runs: at least one run.
        words: Megatron's flags that the user added to those of the suite.
    """

    name: str
    runs: Sequence[Trained]
    words: Sequence[str] = ()

    @property
    def iterations(self) -> int:
        """The iterations of its longest run."""
        return max(run.iterations for run in self.runs)

    @property
    def model(self) -> tuple[object, ...]:
        """A key that is equal for suites that differ only in length."""
        return (
            *self.words,
            *(self.runs[0].start.get(k) for k in ("global_batch_size", "seq_length")),
        )

    @property
    def compared(self) -> dict[str, list[Trained]]:
        """The runs that are compared with one another, by experiment; those of lengths come last.

        Runs of no experiment are compared by length, if a label was trained at several.
        """
        found = {name: self.of(name) for name in ("optimizers", "ablations", "recipes", "runs")}
        ends = {(run.label, run.iterations) for run in found["runs"]}
        if len(ends) > len({label for label, _ in ends}):
            alone = found.pop("runs")
            for length in sorted({length for _, length in ends}):
                found[f"{length:,} iterations"] = [r for r in alone if r.iterations == length]
        lengths = {
            (run.tags["million"], run.tags["tokens"], run.experiment)
            for run in self.runs
            if "tokens" in run.tags
        }
        found |= {name: self.of(name) for _, _, name in sorted(lengths)}
        return {name: runs for name, runs in found.items() if runs}

    @property
    def sizes(self) -> list[float]:
        """The models that were trained at several lengths, in millions of parameters."""
        return sorted({run.tags["million"] for run in self.runs if "tokens" in run.tags})

    def of_size(self, million: float) -> list[Trained]:
        """Returns the runs of a model of :attr:`sizes`, of all lengths."""
        return [run for run in self.runs if run.tags.get("million") == million]

    def of(self, experiment: str) -> list[Trained]:
        """Returns its runs of one experiment."""
        return [run for run in self.runs if run.experiment == experiment]


def load(paths: Iterable[str | Path]) -> list[Suite]:
    """Returns the suites that ``scripts/reproduce.sh`` wrote, and one suite of all other runs.

    Args:
        paths: folders of suites, of runs (``runs/NAME`` for ``megatron-s3 launch``), or of several
            runs (those of an array or of the quickstart), or logs.

    Raises:
        RunError: there is no log, a log without a first record, or a file that is damaged.
    """
    suites: list[Suite] = []
    alone: list[Trained] = []
    places: dict[Path, Path] = {}
    for path in map(Path, paths):
        places.setdefault(path.resolve(), path)
    for place, path in places.items():
        folders = [record.parent for record in path.glob("*/*/run.json")]
        folders.sort(key=_numbers_in_order)
        if folders := [folder for folder in folders if _is_experiment(folder)]:
            described = path / "suite.json"
            words = written(described).get("megatron", []) if described.exists() else []
            runs = [_experiment(folder) for folder in folders]
            known = {suite.name.lower() for suite in suites}  # pictures' names are in lower case
            name = place.name if place.name.lower() not in known else "-".join(place.parts[1:])
            suites.append(Suite(name, runs, tuple(words)))
        elif _is_experiment(path):
            alone.append(_experiment(path))
        else:
            alone += map(_run, _runs_in(path))
    if alone:
        once = {(_log(run.folder) or run.folder).resolve(): run for run in alone}
        suites.append(Suite("runs", _told_apart([*once.values()])))
    return suites


def written(path: Path) -> Any:
    """Returns the content of a JSON file of ``scripts/reproduce.sh``.

    Raises:
        RunError: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path}: not a file of scripts/reproduce.sh: {error}") from error


def _log(folder: Path) -> Path | None:
    """Returns the log of a run; None if there is none."""
    places = (folder, folder / runlog.NAME, folder / "tensorboard" / runlog.NAME)
    return next((place for place in places if place.is_file()), None)


def _runs_in(folder: Path) -> list[Path]:
    """Returns a run's folder itself, or the runs that are folders in it."""
    if _log(folder) is None and folder.is_dir():
        return [each for each in _folders(folder) if _log(each)] or [folder]
    return [folder]


def _folders(folder: Path) -> list[Path]:
    return sorted((each for each in folder.iterdir() if each.is_dir()), key=_numbers_in_order)


def left_out(paths: Iterable[str | Path]) -> list[Path]:
    """Returns the launched runs beside those of :func:`load` that have no log, as failed ones."""
    return [
        each
        for path in map(Path, paths)
        if _log(path) is None and path.is_dir() and not any(path.glob("*/*/run.json"))
        for each in _folders(path)
        if not _log(each) and (each / "config.yaml").exists()
    ]


def _numbers_in_order(folder: Path) -> list[str | float]:
    """Returns a key that sorts folders by name, with 2 before 10."""
    parts = re.split(r"(\d+(?:\.\d+)?)", str(folder))  # every other part is a number
    return [float(part) if k % 2 else part for k, part in enumerate(parts)]


def _read(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the records of a run, and a warning for each line that is cut off, as after a kill.

    Raises:
        RunError: there is no log, its first record is missing, or it is damaged in another way.
    """
    path = _log(folder)
    if not folder.exists():
        raise RunError(f"{folder}: no such folder; give the folder of a run, such as runs/NAME")
    if path is None:
        raise RunError(
            f"{folder}: neither it nor a folder in it has a {runlog.NAME}; train with "
            "--tensorboard-dir and --plugin-log-updates, or with --plugin-metrics for an optimizer "
            "of Megatron"
        )
    try:
        lines = path.read_bytes().decode().split("\n")
    except UnicodeDecodeError as error:
        raise RunError(f"{path}: damaged: not UTF-8 at byte {error.start}") from error
    parsed: list[Any] = []
    cut: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
            if line.startswith('{"') and not line.endswith("}"):
                cut.append(f"{path}, line {number}: cut off; the report leaves this record out")
                continue
        if not _is_record(record):
            remedy = (
                "remove the line" if parsed else f"a log of a run ({runlog.NAME}) begins with one"
            )
            raise RunError(f"{path}, line {number}: damaged: not a record of a run; {remedy}")
        parsed.append(record)
    records = runlog.resumed(parsed)
    if not records or records[0]["kind"] != "start":
        raise RunError(
            f"{path}: the log has no start record; wait until the run has begun to train"
        )
    return records, cut


def _is_record(value: Any) -> bool:
    """Returns whether a line's value has the fields by which a record is read."""
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in _NUMBERS:
        return isinstance(kind, str)
    whole, other = _NUMBERS[kind]
    try:
        if value[other] is not None or kind not in ("start", "train"):
            float(value[other])
        if kind == "train" and (updates := value.get("updates")):
            float(updates["all"]["mean_abs"]), float(updates["all"]["max_abs"])
        return isinstance(value[whole], int) and (kind != "start" or "optimizer" in value)
    except (KeyError, TypeError, ValueError):
        return False


def _is_experiment(folder: Path) -> bool:
    """Returns whether ``scripts/reproduce.sh`` made a run; the quickstart has a run.json too."""
    record = folder / "run.json"
    try:
        return record.exists() and "plan" not in json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        return True  # damaged, which is reported when it is read


def _experiment(folder: Path) -> Trained:
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return Trained(
            folder, run["experiment"], run["label"], run["optimizer"], float(run["lr"]),
            int(run["seed"]), run["tags"], *_read(folder),
        )  # fmt: skip
    except RunError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{folder / 'run.json'}: not a run of scripts/reproduce.sh: {error}"
        ) from error


def _run(folder: Path) -> Trained:
    records, damage = _read(folder)
    start = _start(records)
    lr = float(start.get("hyperparameters", {}).get("lr") or math.nan)
    return Trained(
        folder, "runs", start.get("label") or start["optimizer"], start["optimizer"], lr,
        int(start.get("seed") or 0), {}, records, damage,
    )  # fmt: skip


def _start(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return next(record for record in reversed(records) if record["kind"] == "start")


def _told_apart(runs: Sequence[Trained]) -> list[Trained]:
    """Returns the runs with labels that name the settings in which they differ.

    The learning rate is not named, nor a weight decay that changes with it. Finished runs that
    differ in nothing are named by their folders, because they are not two seeds.
    """

    def place(run: Trained, name: str) -> tuple[object, ...]:
        return (run.label, name, *([run.lr] if name == "weight_decay" else []))

    names = {name for run in runs for name in _settings(run)}
    found: dict[tuple[object, ...], list[object]] = {}
    for run in runs:
        own = _settings(run)
        for name in names:
            values = found.setdefault(place(run, name), [])
            if own.get(name) not in values:
                values.append(own.get(name))
    named = []
    for run in runs:
        words = [f"{n} {v}" for n, v in _settings(run).items() if len(found[place(run, n)]) > 1]
        named.append(replace(run, label=", ".join([run.label, *words])))

    def key(run: Trained) -> tuple[object, ...]:
        return run.label, run.lr, run.seed, run.iterations

    count = Counter(key(run) for run in named if run.finished)
    return [
        replace(run, label=f"{run.label} ({run.folder})") if count[key(run)] > 1 else run
        for run in named
    ]


def _settings(run: Trained) -> dict[str, Any]:
    """Returns the settings of a run that its log tells, without the learning rate."""
    more = {name: run.start.get(name) for name in ("global_batch_size", "seq_length")}
    more["overrides"] = ", ".join(map(repr, run.start.get("overrides") or ())) or None
    return {k: v for k, v in run.start.get("hyperparameters", {}).items() if k != "lr"} | more
