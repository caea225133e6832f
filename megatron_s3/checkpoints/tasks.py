"""The paper's five tasks, as lm-evaluation-harness defines them, on the hub's or local data."""

import functools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_s3.errors import MegatronS3Error

__all__ = ["TASKS", "Task", "TaskError", "load", "manager"]


class TaskError(MegatronS3Error, ValueError):
    """Raised for unreadable data of a task; the message names file, line and expected keys."""


@dataclass(frozen=True)
class Task:
    """One of the tasks.

    Attributes:
        label: the name in Figure 6.
        harness: the name in lm-evaluation-harness, whose prompts and scoring are used.
        folder: the folder of its definition, below ``lm_eval/tasks``.
        choices: the number of answers to choose from.
        keys: the keys of a record in a local JSON-lines file, as in the dataset on the hub.
        labels: the key of the right answer, and its possible values.
    """

    label: str
    harness: str
    folder: str
    choices: int
    keys: tuple[str, ...]
    labels: tuple[str, tuple[int | str, ...]]


#: The tasks by the name that ``--tasks`` and local files (``piqa.jsonl``) have.
TASKS = {
    "cb": Task("CB", "cb", "super_glue/cb", 3, ("premise", "hypothesis"), ("label", (0, 1, 2))),
    "piqa": Task("PIQA", "piqa", "piqa", 2, ("goal", "sol1", "sol2"), ("label", (0, 1))),
    "siqa": Task(
        "SIQA",
        "social_iqa",
        "siqa",
        3,
        ("context", "question", "answerA", "answerB", "answerC"),
        ("label", ("1", "2", "3")),
    ),
    # 2016, because the answers of 2018's test set are not public.
    "storycloze": Task(
        "StoryCloze",
        "storycloze_2016",
        "storycloze",
        2,
        (*(f"input_sentence_{i}" for i in range(1, 5)), "sentence_quiz1", "sentence_quiz2"),
        ("answer_right_ending", (1, 2)),
    ),
    "hellaswag": Task(
        "HellaSwag",
        "hellaswag",
        "hellaswag",
        4,
        ("activity_label", "ctx_a", "ctx_b", "endings"),
        ("label", ("0", "1", "2", "3")),
    ),
}


@functools.cache
def manager() -> Any:
    """Returns the harness's index of these five tasks; the index of all tasks takes 10 s."""
    import lm_eval.tasks

    (root,) = lm_eval.tasks.__path__
    folders = [Path(root, task.folder) for task in TASKS.values()]
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=folders)


def load(names: Sequence[str], data: str | Path | None = None) -> dict[str, Any]:
    """Returns the harness's task objects with their data loaded.

    Args:
        names: keys of :data:`TASKS`.
        data: folder with NAME.jsonl for each; the Hugging Face hub, or its cache, if None.

    Returns:
        Objects of lm-evaluation-harness by name.

    Raises:
        TaskError: the data of a task cannot be loaded, or a record in a local file is invalid.
    """
    files = {}
    if data is not None:
        files = {name: Path(data, f"{name}.jsonl").absolute() for name in names}
        for name, file in files.items():
            _check(name, file)
    loaded = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            harness = TASKS[name].harness
            wanted = harness
            if name in files:
                wanted = str(Path(scratch, f"{harness}.yaml"))
                definition = manager().task_index[harness].yaml_path
                Path(wanted).write_text(_on_file(harness, definition, files[name]))
            try:
                loaded[name] = manager().load([wanted])["tasks"][harness]
            except Exception as error:
                raise TaskError(_missing(name, files.get(name), error)) from error
    return loaded


def _on_file(harness: str, definition: Path, file: Path) -> str:
    """Returns the harness's definition of a task with local data, in JSON (which is valid YAML)."""
    return json.dumps(
        {
            "include": str(definition),
            "task": harness,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"validation": str(file)}},
            "training_split": None,
            "validation_split": "validation",
            "test_split": None,
        }
    )


def _missing(name: str, file: Path | None, error: Exception) -> str:
    reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    if file:
        return f"{file}: the datasets library cannot read it ({reason})"
    return (
        f"task {name}: its dataset cannot be loaded from the Hugging Face hub ({reason}). Connect "
        f"this machine to the hub, or give --data FOLDER with {name}.jsonl in it: "
        f"{_described(name)}."
    )


def _described(name: str) -> str:
    task = TASKS[name]
    label, values = task.labels
    shown = ", ".join(json.dumps(value) for value in values)
    return f"an object a line with the keys {', '.join(task.keys)} and {label} ({shown})"


def _check(name: str, file: Path) -> None:
    """Checks every record of a local file, so that an error names its line."""
    task = TASKS[name]
    expected = f"{name}.jsonl holds {_described(name)}"
    if not file.is_file():
        raise TaskError(f"task {name}: there is no file {file}; {expected}")
    count = 0
    with file.open("rb") as lines:  # json decodes them, so an encoding error has its line too
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise TaskError(f"{file}:{number}: not JSON ({error}); {expected}") from None
            label, values = task.labels
            if not isinstance(record, dict) or (
                missing := [key for key in (*task.keys, label) if key not in record]
            ):
                what = (
                    f"has no {', '.join(missing)}" if isinstance(record, dict) else "not an object"
                )
                raise TaskError(f"{file}:{number}: {what}; {expected}")
            for key in task.keys:
                several = key == "endings"
                texts = record[key] if several else [record[key]]
                if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
                    kind = "a list of strings" if several else "a string"
                    raise TaskError(f"{file}:{number}: {key} is not {kind}; {expected}")
            if "endings" in record and len(record["endings"]) != task.choices:
                raise TaskError(f"{file}:{number}: endings must have {task.choices} elements")
            value = record[label]
            # 1.0 and true equal 1 in Python, and are no index of an answer.
            if type(value) is not type(values[0]) or value not in values:
                raise TaskError(
                    f"{file}:{number}: {label} is {json.dumps(value)}, not one of "
                    f"{', '.join(json.dumps(v) for v in values)}; {expected}"
                )
            count += 1
    if not count:
        raise TaskError(f"{file} is empty; {expected}")
