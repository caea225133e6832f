"""Logs of runs that were never trained, and rows of the tables of a report."""

import json
from pathlib import Path

from megatron_s3.report import compare

__all__ = ["named", "row", "write"]


def write(
    folder: Path, label: str, lr: float, seed: int, final: float, iterations: int = 100, **more
) -> Path:
    """A run whose loss falls from 3 to its final one on a line, and its record."""
    folder.mkdir(parents=True)
    optimizer = more.pop("optimizer", "s3" if label.startswith("S3") else "adamw")
    hyperparameters = {"lr": lr, "weight_decay": 0.01, "beta": more.pop("beta", 0.95)}
    lines = [
        {"kind": "start", "iteration": 0, "optimizer": optimizer, "label": label, "bound": 1.0,
         "hyperparameters": hyperparameters, "seed": seed, "global_batch_size": 8, "seq_length": 4,
         "train_iters": iterations},
    ]  # fmt: skip
    for i in range(10, more.pop("until", iterations) + 1, 10):
        part = {"numel": 4, "mean_abs": 0.2, "max_abs": 0.5 + i / 1000, "grad_rms": 0.5}
        updates = {"all": part, "layers": {"0": part}, "kinds": {"mlp.fc1": part}}
        loss = 3 + (final - 3) * i / iterations
        lines.append({"kind": "train", "iteration": i, "loss": loss, "updates": updates})
        if i % 50 == 0:
            lines.append({"kind": "valid", "iteration": i, "loss": loss})
    if "test" in more:
        lines.append({"kind": "test", "iteration": iterations, "loss": more["test"]})
    if more.get("spike"):
        lines.append({"kind": "spike", "onset": more["spike"], "peak": 60, "end": 70,
                      "height": "0.5", "area": 2.0, "first": ["embedding x2.0"]})  # fmt: skip
    text = "\n".join(map(json.dumps, lines)) + "\n"
    (folder / "metrics.jsonl").write_text(text)
    if "experiment" in more:
        record = {"experiment": more["experiment"], "label": label, "optimizer": optimizer,
                  "lr": lr, "seed": seed, "tags": more.get("tags", {})}  # fmt: skip
        (folder / "run.json").write_text(json.dumps(record))
    return folder


def row(table: compare.Table, name: str) -> dict[str, str]:
    cells = next(row for row in table.rows if row[0] == name)
    return dict(zip(table.headings, cells, strict=True))


def named(tables: list[compare.Table], words: str) -> compare.Table:
    return next(table for table in tables if words in table.title)
