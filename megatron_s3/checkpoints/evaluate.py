"""``megatron-s3 eval``: accuracy of Hugging Face models on the paper's tasks, as in Figure 6."""

import argparse
import importlib.metadata
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_s3.checkpoints import vocabulary
from megatron_s3.checkpoints.accuracies import figure, table
from megatron_s3.checkpoints.tasks import TASKS, TaskError, load, manager
from megatron_s3.errors import MegatronS3Error, no_folder
from megatron_s3.log import say_here
from megatron_s3.storage.writable import refuse_unwritable
from megatron_s3.version import __version__

__all__ = ["EvaluationError", "evaluate", "figure", "main", "table"]

_VERSIONS = ("lm_eval", "transformers", "datasets", "tokenizers", "torch")


class EvaluationError(MegatronS3Error, ValueError):
    """Raised where the evaluation cannot run; the message says why and what to do."""


def evaluate(
    models: Mapping[str, Path],
    tasks: Sequence[str],
    *,
    data: str | Path | None = None,
    tokenizer: str | Path | None = None,
    device: str | None = None,
    batch_size: int = 8,
    limit: int | None = None,
) -> dict[str, Any]:
    """Runs lm-evaluation-harness without examples in the prompt (zero-shot).

    Args:
        models: folders of Hugging Face models, by the name that the table shows.
        tasks: keys of :data:`megatron_s3.checkpoints.tasks.TASKS`.
        data: a folder with NAME.jsonl for each task; the Hugging Face hub if None.
        tokenizer: the folder of the tokenizer; each model's own if None.
        device: torch's name of the device; CUDA if available, if None.
        batch_size: the number of prompts in a forward pass.
        limit: the number of samples of each task; all if None.

    Returns:
        The content of results.json.

    Raises:
        EvaluationError, TaskError: the input is unusable; nothing was computed.
    """
    for folder in models.values():
        _check_files(folder, tokenizer)
    exports = {name: _exported(folder) for name, folder in models.items()}
    _check_device(device)
    try:
        import lm_eval
        import matplotlib  # noqa: F401  (the figure needs it after the work)
        import torch
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise EvaluationError(f'{error}: pip install "megatron-s3[eval]"') from error
    for folder in models.values():
        _check_vocabulary(folder, tokenizer or folder)
    loaded = load(tasks, data)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for number, (name, folder) in enumerate(models.items(), 1):
        say_here(f"{name} ({folder}), model {number} of {len(models)}, on {device}")
        model = HFLM(
            str(folder),
            tokenizer=str(tokenizer) if tokenizer else None,
            device=device,
            batch_size=batch_size,
        )
        run = lm_eval.simple_evaluate(
            model,
            tasks=[*loaded.values()],
            task_manager=manager(),
            num_fewshot=0,
            limit=limit,
            log_samples=False,
            bootstrap_iters=100,  # for CB's F1 alone; accuracy's error has a formula
        )
        found[name] = {
            "folder": str(folder.absolute()),
            "export": exports[name],
            "tasks": {task: _measured(run, TASKS[task].harness) for task in tasks},
        }
        del model
    return {
        "versions": {"megatron_s3": __version__}
        | {package: importlib.metadata.version(package) for package in _VERSIONS},
        "harness_tasks": {task: TASKS[task].harness for task in tasks},
        "harness_task_versions": {task: run["versions"][TASKS[task].harness] for task in tasks},
        "data": str(Path(data).absolute()) if data else "Hugging Face hub",
        "fewshot": 0,
        "limit": limit,
        "models": found,
    }


def _check_device(device: str | None) -> None:
    """Checks that the device exists; the harness would silently use the CPU.

    Raises:
        EvaluationError: it does not exist, or the name is not that of a device.
    """
    if device is None:
        return
    import torch

    try:
        asked = torch.device(device)
    except RuntimeError:
        asked = None
    if asked is None or asked.type not in ("cpu", "cuda"):
        raise EvaluationError(f"--device {device}: no such device; give cuda, cuda:1 or cpu")
    if asked.type == "cuda" and (asked.index or 0) >= torch.cuda.device_count():
        raise EvaluationError(
            f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices for "
            "PyTorch; give cpu, or leave --device out"
        )


def _check_files(folder: Path, tokenizer: str | Path | None) -> None:
    if not folder.is_dir():
        raise EvaluationError(
            f"{folder}: {no_folder(folder)}; give the folder that megatron-s3 export wrote"
        )
    if not (folder / "config.json").is_file():
        raise EvaluationError(
            f"{folder}: not a Hugging Face model, config.json is missing; make one from a "
            "checkpoint with megatron-s3 export"
        )
    of = Path(tokenizer or folder)
    if not any((of / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise EvaluationError(
            f"{of}: no tokenizer (tokenizer.json, or vocab.json and merges.txt); give the folder "
            "of the model's tokenizer with --tokenizer FOLDER"
        )


def _exported(folder: Path) -> Any:
    """Returns what ``megatron-s3 export`` recorded of a model; None for another model."""
    record = folder / "export.json"
    try:
        return json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
    except ValueError as error:
        raise EvaluationError(
            f"{record} is damaged ({error}); export the model again, or remove the file"
        ) from error


def _check_vocabulary(folder: Path, of: str | Path) -> None:
    from transformers import AutoConfig

    try:
        rows = AutoConfig.from_pretrained(folder, local_files_only=True).vocab_size
        size = vocabulary.rows(of)
    except Exception as error:
        raise EvaluationError(
            f"{folder}, tokenizer {of}: transformers cannot read them: {error}"
        ) from error
    if size > rows:
        raise EvaluationError(
            f"{folder}: its vocabulary has {rows} rows, and the tokenizer {of} needs {size}; "
            "give the folder of the model's tokenizer with --tokenizer FOLDER"
        )


def _measured(run: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Returns a task's metrics (``acc``, ``acc_stderr``, ...); None where one is not a number."""
    figures: dict[str, Any] = {"samples": run["n-samples"][task]["effective"]}
    for name, value in run["results"][task].items():
        metric, comma, _ = name.partition(",")
        if comma:
            number = isinstance(value, int | float) and math.isfinite(value)
            figures[metric] = value if number else None
    return figures


def _models(words: Sequence[str]) -> dict[str, Path]:
    models: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or Path(word).is_dir():
            name, folder = Path(word).absolute().name, word
        if name in models:
            raise EvaluationError(
                f"two models are named {name!r}, {models[name]} and {folder}: give them different "
                "names with NAME=FOLDER"
            )
        models[name] = Path(folder)
    return models


def _tasks(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise EvaluationError(
            f"--tasks {text}: no task {', '.join(map(repr, unknown))}; the tasks are "
            f"{','.join(TASKS)}"
        )
    return names


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def main(argv: list[str]) -> int:
    """Runs the command.

    Returns:
        0; 2 after one line on stderr if the input is unusable, 130 if it was interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="megatron-s3 eval",
        description="Measure zero-shot accuracy on the paper's five tasks with "
        "lm-evaluation-harness, print the table of Figure 6, and write results.json and "
        "results.png.",
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="[NAME=]MODEL_DIR",
        help="Hugging Face model, as megatron-s3 export writes it",
    )
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="folder for results.json and results.png"
    )
    parser.add_argument(
        "--tasks",
        default=",".join(TASKS),
        metavar="NAME,...",
        help="tasks to evaluate (default: all, %(default)s)",
    )
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="folder with a file NAME.jsonl for each task, with the keys of the dataset on the hub "
        "(default: download the data from the hub)",
    )
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="tokenizer of all models (default: each its own)"
    )
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="device to evaluate on: cuda, cuda:1, cpu (default: cuda if there is a GPU)",
    )
    parser.add_argument(
        "--batch-size",
        type=_at_least_one,
        default=8,
        metavar="N",
        help="samples per forward pass (default: 8)",
    )
    parser.add_argument(
        "--limit",
        type=_at_least_one,
        metavar="N",
        help="samples of each task, for a trial (default: all)",
    )
    args = parser.parse_args(argv)
    output = Path(args.output)
    try:
        existing = [n for n in ("results.json", "results.png") if (output / n).exists()]
        if existing:
            raise EvaluationError(f"{output / existing[0]} exists: choose another --output")
        refuse_unwritable(output, "--output")
        results = evaluate(
            _models(args.models),
            _tasks(args.tasks),
            data=args.data,
            tokenizer=args.tokenizer,
            device=args.device,
            batch_size=args.batch_size,
            limit=args.limit,
        )
        shown = {name: model["tasks"] for name, model in results["models"].items()}
        print(table(shown), flush=True)  # first, in case the disk is full
        output.mkdir(parents=True, exist_ok=True)
        (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        figure(shown).savefig(output / "results.png")
    except (EvaluationError, TaskError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"wrote {output / 'results.json'} and {output / 'results.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
