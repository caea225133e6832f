#!/usr/bin/env python3
"""Trains with S3 under every feature of Megatron's that touches an optimizer, in every release.

    python -m tests.matrix [--release NAME=FOLDER ...] [--only REGEX] [--again REGEX] [--out DIR]
    python -m tests.matrix --print

A cell is a feature (a row of ROWS) in a release: a small GPT is trained for 5 steps on CPU ranks,
saved after 3, resumed from there, and everything in the two last checkpoints is compared bitwise:
weights, main parameters, states, param groups, schedule, random numbers. Where S3 does less than
that, the same is done with --optimizer adam, and the cell says which of the two is the reason.

FOLDER is an unpacked wheel of megatron-core, or a Megatron-LM tree, whose own pretrain_gpt.py is
then run (build megatron/core/datasets/helpers_cpp in it beforehand: make needs pybind11). The
installed wheel is always there. Cells are kept in DIR/matrix.json as they end, and only those that
are missing or named by --again (a regex of "RELEASE: ROW") are run; the table is DIR/matrix.md.
"""

import argparse
import contextlib
import fcntl
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.harness.forks import TIMED_OUT, TRAINER, Forks

RANK = Path(__file__).with_name("rank.py")
STEPS, SAVED = 5, 3
#: Seconds after which a run is given up.
LIMIT = 240
#: 120,576 parameters, 8 sequences of 64 made-up tokens a step.
MODEL = f"""--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64
--max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 8 --lr 3e-3
--lr-warmup-iters 2 --lr-decay-iters 1000 --lr-decay-style cosine --weight-decay 0.01 --mock-data
--tokenizer-type NullTokenizer --vocab-size 255 --log-interval 1 --eval-iters 0
--eval-interval 1000 --train-iters {STEPS} --save-interval {SAVED}"""

SHARDED = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
BF16 = f"--bf16 {SHARDED}"
PP2 = f"{BF16} --pipeline-model-parallel-size 2"
# Untied, because there Megatron saves in this format another main parameter of a tied embedding
# than it has, with Adam as with S3.
PP2_RESHARDABLE = f"{PP2} --untie-embeddings-and-output-weights"
VPP = f"{PP2_RESHARDABLE} --num-layers 4 --num-layers-per-virtual-pipeline-stage 1"
TP2 = f"{BF16} --tensor-model-parallel-size 2"
EP2 = f"{BF16} --num-experts 2 --expert-model-parallel-size 2 --no-bias-gelu-fusion"
AWARE = f"{BF16} --use-precision-aware-optimizer"
OFFLOAD = f"{AWARE} --optimizer-cpu-offload --optimizer-offload-fraction"
FSDP2 = "--bf16 --use-torch-fsdp2 --untie-embeddings-and-output-weights"
ASYNC = "--async-save --use-persistent-ckpt-worker --async-strategy mcore"


def _fsdp(strategy: str) -> str:
    return (
        "--bf16 --use-distributed-optimizer --use-megatron-fsdp --ckpt-format fsdp_dtensor "
        f"--data-parallel-sharding-strategy {strategy}"
    )


@dataclass(frozen=True)
class Row:
    """A feature.

    Attributes:
        group, name: what the table calls it.
        ranks: number of processes.
        flags: Megatron's, beside :data:`MODEL`.
        like: name of a row whose losses it must have, digit for digit.
        says: regex that the log of S3's training must hold.
        change: of tests/matrix/rank.py, in every run.
        stand_in: the same, where Megatron's own layers cannot do without Transformer Engine: tried
            when the row has failed without it.
        frozen: regex of what must be in both checkpoints of a run as it was; nothing by default.
        groups: whether S3's param groups must have Adam's rates and weight decay.
        droppable: flags that some releases do not know and do not need.
    """

    group: str
    name: str
    ranks: int
    flags: str
    like: str = ""
    says: str = ""
    change: str = ""
    stand_in: str = ""
    frozen: str = ""
    groups: bool = False
    droppable: str = ""


ROWS = (
    Row("Layout", "one process", 1, "--bf16"),
    Row("Layout", "data parallel, state whole", 2, "--bf16"),
    Row("Layout", "distributed optimizer", 2, BF16,
        like="data parallel, state whole", says="sharded over 2"),
    Row("Layout", "+ `--overlap-grad-reduce`", 2, f"{BF16} --overlap-grad-reduce",
        like="distributed optimizer"),
    Row("Layout", "+ `--overlap-param-gather`", 2,
        f"{BF16} --overlap-grad-reduce --overlap-param-gather", like="distributed optimizer"),
    Row("Layout", "`--num-distributed-optimizer-instances 2`", 4,
        f"{BF16} --num-distributed-optimizer-instances 2", says="sharded over 2"),
    Row("Layout", "tensor parallel 2", 2, TP2),
    Row("Layout", "+ sequence parallel", 2, f"{TP2} --sequence-parallel", stand_in="norms"),
    Row("Layout", "pipeline parallel 2", 2, PP2_RESHARDABLE),
    Row("Layout", "pipeline 2, virtual stages", 2, VPP),
    Row("Layout", "+ `--overlap-param-gather-with-optimizer-step`", 4,
        "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
        "--pipeline-model-parallel-size 2 --num-layers 4 --num-layers-per-virtual-pipeline-stage 1 "
        "--untie-embeddings-and-output-weights --overlap-param-gather-with-optimizer-step "
        "--ckpt-format torch"),
    Row("Layout", "data 2 x tensor 2", 4, TP2, says="sharded over 2"),
    Row("Layout", "data 2 x pipeline 2", 4, PP2_RESHARDABLE, says="sharded over 2"),
    Row("Layout", "tensor 2 x pipeline 2", 4,
        f"{PP2_RESHARDABLE} --tensor-model-parallel-size 2"),
    Row("Layout", "context parallel 2", 2, f"{BF16} --context-parallel-size 2",
        says="sharded over 2", stand_in="attention"),
    Row("Layout", "experts 2", 2, EP2),
    Row("Layout", "data 2 x experts 2 (buffers of experts sharded)", 4, EP2),
    Row("Layout", "tensor 2, experts' tensor 1 x experts 2", 4,
        f"{EP2} --tensor-model-parallel-size 2 --expert-tensor-parallel-size 1 "
        "--sequence-parallel", stand_in="norms"),
    Row("Precision", "fp32", 2, SHARDED),
    Row("Precision", "fp16, loss scale", 2, f"--fp16 {SHARDED} --initial-loss-scale 65536"),
    Row("Precision", "`--grad-reduce-in-bf16`", 2, f"{BF16} --grad-reduce-in-bf16"),
    Row("Precision", "`--use-precision-aware-optimizer`", 2, AWARE),
    Row("Precision", "+ bf16 gradients and states", 2,
        f"{AWARE} --main-grads-dtype bf16 --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16"),
    Row("FSDP", "Megatron-FSDP, no_shard", 2, _fsdp("no_shard")),
    Row("FSDP", "Megatron-FSDP, optim", 2, _fsdp("optim")),
    Row("FSDP", "Megatron-FSDP, optim_grads", 2, _fsdp("optim_grads")),
    Row("FSDP", "Megatron-FSDP, optim_grads_params", 2, _fsdp("optim_grads_params")),
    Row("FSDP", "torch FSDP2, torch_dist", 2, f"{FSDP2} --ckpt-format torch_dist"),
    Row("FSDP", "torch FSDP2, torch_dcp", 2, f"{FSDP2} --ckpt-format torch_dcp"),
    Row("Offload", "`--optimizer-cpu-offload`, half", 2, f"{OFFLOAD} 0.5"),
    Row("Offload", "`--optimizer-cpu-offload`, all", 2, f"{OFFLOAD} 1.0"),
    Row("Offload", "+ `--overlap-cpu-optimizer-d2h-h2d`, all", 2,
        f"{OFFLOAD} 1.0 --overlap-cpu-optimizer-d2h-h2d"),
    Row("Offload", "+ `--overlap-cpu-optimizer-d2h-h2d`, half", 2,
        f"{OFFLOAD} 0.5 --overlap-cpu-optimizer-d2h-h2d"),
    Row("Groups", "`--decoupled-lr`", 2,
        f"{BF16} --decoupled-lr 1e-3 --decoupled-min-lr 1e-4 "
        "--untie-embeddings-and-output-weights", groups=True),
    Row("Groups", "`--apply-wd-to-qk-layernorm`", 2,
        f"{BF16} --qk-layernorm --apply-wd-to-qk-layernorm", groups=True),
    Row("Groups", "`--no-weight-decay-cond-type`", 2,
        f"{BF16} --qk-layernorm --no-weight-decay-cond-type apply_wd_to_qk_layernorm",
        groups=True),
    Row("Groups", "`--no-weight-decay-cond-type qwen3_next`", 2,
        f"{BF16} --qk-layernorm --no-weight-decay-cond-type qwen3_next", groups=True),
    Row("Groups", "`--weight-decay-incr-style linear`", 2,
        f"{BF16} --weight-decay-incr-style linear --start-weight-decay 0.01 "
        "--end-weight-decay 0.1", groups=True),
    Row("Groups", "`--use-mup`", 2, f"{BF16} --use-mup --mup-base-hidden-size 32", groups=True),
    Row("Groups", "frozen embeddings", 2, BF16, change="freeze=embedding",
        frozen="embedding.*weight"),
    # Not reshardable: there Megatron misses the frozen layer's state.
    Row("Groups", "a rank without parameters to train", 2,
        "--bf16 --use-distributed-optimizer --pipeline-model-parallel-size 2 "
        "--untie-embeddings-and-output-weights",
        change="freeze=^stage1", frozen="output_layer.weight"),
    Row("Groups", "`--freeze-all-layers`", 2, f"{BF16} --freeze-all-layers"),
    Row("Watching", "`--log-num-zeros-in-grad`", 2, f"{BF16} --log-num-zeros-in-grad",
        says="num zeros: "),
    Row("Watching", "`--log-params-norm`", 2, f"{BF16} --log-params-norm", says="params norm: "),
    Row("Watching", "`--clip-grad 1.0`", 2, f"{BF16} --clip-grad 1.0", says="grad norm: "),
    # Megatron has no flag for it.
    Row("Watching", "`grad_norm_skip_threshold`, not reached", 2, BF16, says="grad norm: ",
        change="config=grad_norm_skip_threshold:1e6", like="distributed optimizer"),
    Row("Watching", "`--rerun-mode validate_results`", 2, f"{BF16} --rerun-mode validate_results"),
    Row("Watching", "`--rerun-mode report_stats`", 2, f"{BF16} --rerun-mode report_stats"),
    Row("Watching", "`--rerun-mode disabled`", 2, f"{BF16} --rerun-mode disabled"),
    Row("Watching", "`--check-weight-hash-across-dp-replicas-interval`", 2,
        f"{BF16} --check-weight-hash-across-dp-replicas-interval 1"),
    Row("Checkpoints", "torch", 2, "--bf16 --use-distributed-optimizer --ckpt-format torch"),
    Row("Checkpoints", "torch, state whole", 2, "--bf16 --ckpt-format torch"),
    Row("Checkpoints", "torch_dist, dp_reshardable", 2, "--bf16 --use-distributed-optimizer"),
    Row("Checkpoints", "torch_dist, fully_reshardable, memory-efficient", 2,
        f"{BF16} --distrib-optim-fully-reshardable-mem-efficient"),
    Row("Checkpoints", "`--async-save`, fully_reshardable", 2, f"{BF16} {ASYNC}",
        droppable="--async-strategy mcore --use-persistent-ckpt-worker"),
    Row("Checkpoints", "`--async-save`, dp_reshardable", 2,
        f"--bf16 --use-distributed-optimizer {ASYNC}",
        droppable="--async-strategy mcore --use-persistent-ckpt-worker"),
)  # fmt: skip

#: A cell's verdict and how the table shows it.
SHOWN = {
    "bitwise": "bitwise",
    "losses": "losses",
    "trained": "trained",
    "refused": "refused",
    "not here": "not here",
    "absent": "–",
    "defect": "**DEFECT**",
}
STAND_IN = (
    "with Megatron's own norms, or attention, made to work on parts of a sequence "
    "(tests/matrix/rank.py): without that it asks for Transformer Engine's."
)
_ABSENT = re.compile(r"error: (unrecognized arguments|argument (?!--optimizer:).*: invalid choice)")
_ERROR = re.compile(r"^(?:\[rank\d+\]: ?)?([\w.]*(?:Error|Exception|Moved)\b.*|.*: error: .*)$")
_FRAME = re.compile(r'^(?:\[rank\d+\]: ?)?\s+File "([^"]+)", line \d+')
_LOSS = re.compile(r"iteration +(\d+)/.*?lm loss: (\S+)")
_SKIPPED = re.compile(r"number of (?:skipped|nan) iterations: +[1-9]")


@dataclass(frozen=True)
class Release:
    """A Megatron to run in: its name in the table, its folder (None: installed), its program."""

    name: str
    folder: Path | None
    program: str


class Trial:
    """Runs of one release, in a folder of their own.

    Args:
        release: where.
        losses: S3's of the rows that were run before, by their names.
    """

    def __init__(self, release: Release, losses: Callable[[str], dict[str, str]]) -> None:
        self.release = release
        self.losses = losses
        self._forks: Forks | None = None

    def cell(self, row: Row) -> dict[str, Any]:
        """The row in this release."""
        begun = time.monotonic()
        s3 = self._attempt(row, "s3", row.change)
        alone = s3
        if s3["outcome"] == "failed" and row.stand_in and not _ABSENT.search(s3["error"]):
            s3 = self._attempt(row, "s3", row.stand_in)
        adam = None
        if row.groups or s3["outcome"] != "bitwise":
            change = row.change if s3 is alone else row.stand_in
            if not _ABSENT.search(s3.get("error", "")):
                adam = self._attempt(row, "adam", change)
        if row.groups and adam and "groups" in s3 and "groups" in adam:
            s3["wrong"] += _other_groups(s3["groups"], adam["groups"])
        result = {"verdict": verdict(s3, adam), "note": note(s3, adam), "s3": s3, "adam": adam}
        if s3 is not alone:
            result["without stand-in"] = alone["error"]
        for attempt in (s3, adam or {}):
            attempt.pop("groups", None)
        return result | {"seconds": round(time.monotonic() - begun, 1)}

    def _attempt(self, row: Row, optimizer: str, change: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
            return self._train(row, optimizer, change, Path(folder))

    def _train(self, row: Row, optimizer: str, change: str, folder: Path) -> dict[str, Any]:
        words = [*MODEL.split(), *row.flags.split(), "--optimizer", optimizer]
        through, resumed = folder / "through", folder / "resumed"
        result: dict[str, Any] = {"outcome": "failed", "wrong": []}
        status, log = self._run(row, change, [*words, "--save", str(through)])
        known = [f for f in row.droppable.split() if f.startswith("--") and f in log]
        if status and known and _ABSENT.search(log):
            words = _without(words, row.droppable.split())
            status, log = self._run(row, change, [*words, "--save", str(through)])
        losses = dict(_LOSS.findall(log))
        if status or str(STEPS) not in losses:
            return result | failure(log, status)
        result |= {"outcome": "not resumed", "losses": losses}
        if optimizer == "s3":
            result["wrong"] += self._wrong(row, log, losses)
        if not (through / f"iter_{SAVED:07d}").is_dir():
            return result | {"error": "trained, and saved nothing", "refused": False}
        (through / "latest_checkpointed_iteration.txt").write_text(str(SAVED))
        status, log = self._run(
            row, change, [*words, "--load", str(through), "--save", str(resumed)]
        )
        after = dict(_LOSS.findall(log))
        if status or str(STEPS) not in after or str(SAVED) in after:
            return result | failure(log, status)
        result["same losses"] = after[str(STEPS)] == losses[str(STEPS)]
        ends = [f / f"iter_{STEPS:07d}" for f in (through, resumed)]
        output = folder / "compared.json"
        argv = ["compare", *map(str, ends), str(through / f"iter_{SAVED:07d}"), str(output)]
        status, log = self._run(row, "", argv, program=str(RANK), ranks=1)
        if status:
            return result | {"outcome": "not compared"} | failure(log, status)
        found = json.loads(output.read_text())
        still = found.pop("still")
        result |= {"outcome": "differs" if found["differ"] else "bitwise"} | found
        frozen = re.compile(row.frozen or "(?!)")
        result["wrong"] += [
            f"{name} did not change"
            for name in still
            if re.search("exp_(avg|pnorm)", name) and not frozen.search(name)
        ]
        if row.frozen and not any(frozen.search(name) for name in still):
            result["wrong"].append(f"nothing that matches {row.frozen} stayed as it was")
        return result

    def _run(
        self, row: Row, change: str, argv: list[str], program: str = "", ranks: int = 0
    ) -> tuple[int, str]:
        if self._forks is None:
            self._forks = Forks(self.release.folder, self.release.program)
        if change:
            program, argv = str(RANK), [change, self.release.program, *argv]
        with tempfile.NamedTemporaryFile("r", errors="replace") as log:
            try:
                status = self._forks.run(argv, ranks or row.ranks, log.name, program or None, LIMIT)
            except RuntimeError:
                self._forks = None
                raise
            return status, log.read()

    def _wrong(self, row: Row, log: str, losses: dict[str, str]) -> list[str]:
        wrong = []
        if not re.search(r"^\[megatron_s3\] S3 .* with ", log, re.MULTILINE):
            wrong.append("S3 has not said that it was built")
        if row.says and not re.search(row.says, log):
            wrong.append(f"the log does not hold {row.says!r}")
        if _SKIPPED.search(log):
            wrong.append("an iteration was skipped")
        expected = self.losses(row.like) if row.like else {}
        if expected and losses != expected:
            wrong.append(f"other losses than {row.like}")
        if any(not abs(float(loss)) < 100 for loss in losses.values()):
            wrong.append("a loss is not finite")
        return wrong

    def close(self) -> None:
        """Ends the process that forks."""
        if self._forks is not None:
            self._forks.close()


def failure(log: str, status: int) -> dict[str, Any]:
    """What the first error of a log says, and whether the plugin has refused something."""
    if status == TIMED_OUT:
        return {"error": f"not finished after {LIMIT} s", "refused": False}
    frame = ""
    lines = log.splitlines()
    for number, line in enumerate(lines):
        frame = found[1] if (found := _FRAME.match(line)) else frame
        if error := _ERROR.match(line):
            text = error[1]
            if text.rstrip(": ") == "AssertionError":  # a bare one: what was asserted
                said = [each for each in lines[:number] if each.strip(" ^~")]
                text = ": ".join(["AssertionError", *(each.strip() for each in said[-1:])])
            refused = "/megatron_s3/" in frame and text.startswith("ValueError")
            return {"error": text, "refused": refused}
    end = [line for line in lines if line.strip()][-1:]
    return {"error": f"exit status {status}: {''.join(end)}", "refused": False}


def verdict(s3: dict[str, Any], adam: dict[str, Any] | None) -> str:
    """The word of :data:`SHOWN` for what S3 did, beside what Adam did where S3 did not do all."""
    if _ABSENT.search(s3.get("error", "")):
        return "absent"
    if s3["wrong"]:
        return "defect"
    if s3["outcome"] == "bitwise":
        return "bitwise"
    order = ("failed", "not resumed", "not compared", "differs", "bitwise")
    better = adam is not None and order.index(adam["outcome"]) > order.index(s3["outcome"])
    if s3["outcome"] == "failed":
        return "refused" if s3["refused"] else "defect" if better else "not here"
    if better:
        return "defect"
    return "losses" if s3.get("same losses") else "trained"


def note(s3: dict[str, Any], adam: dict[str, Any] | None) -> str:
    """What a footnote says of the cell; empty where all is well."""
    if s3["wrong"]:
        return "; ".join(s3["wrong"][:3])
    if s3["outcome"] == "bitwise" or _ABSENT.search(s3.get("error", "")):
        return ""
    what = _of(s3)
    if adam is None or _of(adam) == what:
        return what + ("" if adam is None else " (Adam: the same)")
    return f"{what} (Adam: {_of(adam)})"


def _of(attempt: dict[str, Any]) -> str:
    if attempt["outcome"] == "differs":
        names = ", ".join(attempt["differ"][:2])
        return f"{len(attempt['differ'])} of {attempt['values']} values differ: {names}"
    where = {"not resumed": "resuming: ", "not compared": "comparing: "}
    return where.get(attempt["outcome"], "") + attempt.get("error", attempt["outcome"])


def _other_groups(s3: list[dict], adam: list[dict]) -> list[str]:
    """Param groups of S3's that have not Adam's rates, weight decay and so on."""
    if len(s3) != len(adam) or not s3:
        return [f"{len(s3)} param groups, Adam has {len(adam)}"]
    shared = set.intersection(*(set(group) for group in (*s3, *adam)))
    shared -= {"step", "beta", "p"}
    kept = [
        sorted(json.dumps({k: g[k] for k in sorted(shared)}) for g in groups)
        for groups in (s3, adam)
    ]
    return [] if kept[0] == kept[1] else [f"param groups differ from Adam's: {kept}"]


def _without(words: list[str], dropped: list[str]) -> list[str]:
    text = f" {' '.join(words)} "
    for flag in re.findall(r"--\S+(?: (?!--)\S+)?", " ".join(dropped)):
        text = text.replace(f" {flag} ", " ")
    return text.split()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class Results:
    """The cells of DIR/matrix.json, which is written after each; by several of this, too."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "matrix.json"
        self._lock = threading.Lock()
        self.data: dict[str, Any] = {"releases": {}, "cells": {}}
        self._read()

    def _read(self) -> None:
        if self.file.exists():
            self.data = json.loads(self.file.read_text())

    def cell(self, release: str, row: str) -> dict[str, Any] | None:
        """A cell, or None."""
        return self.data["cells"].get(release, {}).get(row)

    def keep(self, release: Release, row: Row, cell: dict[str, Any]) -> None:
        """Adds a cell and writes everything."""
        with self._lock, _locked(self.file.parent):
            self._read()
            packages = {"torch": version("torch"), "date": date.today().isoformat()}
            self.data["releases"][release.name] = packages | {"runs": Path(release.program).name}
            cell |= {"flags": row.flags, "ranks": row.ranks, "commit": _commit()}
            self.data["cells"].setdefault(release.name, {})[row.name] = cell
            temporary = self.file.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.data, indent=1, sort_keys=True) + "\n")
            temporary.replace(self.file)


@functools.cache
def _commit() -> str:
    """Of the code that runs; empty outside a checkout."""
    command = ["git", "-C", str(RANK.parent), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def table(data: dict[str, Any], merged: bool = False) -> str:
    """The Markdown table of all cells, and the notes to them.

    Args:
        data: of :class:`Results`.
        merged: whether neighbours of a group with the same cells share a line.
    """
    releases = sorted(data["releases"], key=lambda name: (name == "main", name))
    notes: dict[str, int] = {}
    lines: list[tuple[str, list[str], list[str]]] = []  # group, features, cells
    for row in ROWS:
        cells = [data["cells"].get(name, {}).get(row.name) for name in releases]
        shown = [str(row.ranks), *(_shown(cell, notes) for cell in cells)]
        if merged and lines and (lines[-1][0], lines[-1][2]) == (row.group, shown):
            lines[-1][1].append(row.name)
        else:
            lines.append((row.group, [row.name], shown))
    text = [f"| feature | ranks | {' | '.join(releases)} |", f"|---|---|{'---|' * len(releases)}"]
    for number, (group, features, shown) in enumerate(lines):
        if not number or lines[number - 1][0] != group:
            text.append(f"| **{group}** | | {'| ' * len(releases)}|")
        text.append(f"| {', '.join(features)} | {' | '.join(shown)} |")
    text += ["", *(f"{number}. {said}" for said, number in notes.items())]
    if any("†" in cell for _, _, shown in lines for cell in shown):
        text += ["", f"† {STAND_IN}"]
    counts = [cell["verdict"] for cells in data["cells"].values() for cell in cells.values()]
    text += ["", ", ".join(f"{counts.count(word)} {word}" for word in SHOWN if word in counts)]
    commits = {c.get("commit", "") for cells in data["cells"].values() for c in cells.values()}
    text[-1] += f"; commits {', '.join(sorted(commits - {''}) or ['unknown'])}"
    return "\n".join(text)


def _shown(cell: dict[str, Any] | None, notes: dict[str, int]) -> str:
    if cell is None:
        return ""
    text = SHOWN[cell["verdict"]]
    if "without stand-in" in cell:
        text += " †"
    if cell["note"]:
        plain = re.sub(r"/\S*/(?=megatron)", "", cell["note"])
        text += f" [{notes.setdefault(textwrap.shorten(plain, 250), len(notes) + 1)}]"
    return text


def releases(named: Iterable[str]) -> list[Release]:
    """The installed release, and those given as NAME=FOLDER."""
    found = [Release(version("megatron-core"), None, TRAINER)]
    for text in named:
        name, _, folder = text.partition("=")
        path = Path(folder).expanduser().resolve()
        if not folder or not (path / "megatron/core").is_dir():
            raise SystemExit(f"error: --release {text}: expected NAME=FOLDER that holds megatron/")
        script = path / "pretrain_gpt.py"
        found.append(Release(name, path, str(script) if script.exists() else TRAINER))
    return found


def _wanted(args: argparse.Namespace, results: Results, release: Release, row: Row) -> bool:
    label = f"{release.name}: {row.name}"
    if args.only is not None and not re.search(args.only, label):
        return False
    again = args.again is not None and re.search(args.again, label)
    return bool(again) or results.cell(release.name, row.name) is None


def main() -> int:
    """Runs the command; 1 if a cell is a defect."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--release", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--only", metavar="REGEX", help="of RELEASE: ROW; leave out all others")
    parser.add_argument("--again", metavar="REGEX", help="of RELEASE: ROW; run these again")
    parser.add_argument("--out", type=Path, default=Path("runs/matrix"))
    parser.add_argument("--jobs", type=int, default=1, help="releases side by side")
    parser.add_argument("--print", action="store_true", help="print the table of what is known")
    args = parser.parse_args()
    results = Results(args.out)
    if not args.print:
        work = [
            (release, [row for row in ROWS if _wanted(args, results, release, row)])
            for release in releases(args.release)
        ]
        total, done = sum(len(rows) for _, rows in work), []

        def run(release: Release, rows: list[Row]) -> None:
            def losses(name: str) -> dict[str, str]:
                known = results.cell(release.name, name) or {"s3": {}}
                return known["s3"].get("losses", {})

            trial = Trial(release, losses)
            for row in rows:
                if not _wanted(args, results, release, row):
                    continue  # run by another of this meanwhile
                cell = trial.cell(row)
                results.keep(release, row, cell)
                done.append(row)
                said = f"{cell['verdict']}{': ' if cell['note'] else ''}{cell['note']}"
                print(f"{len(done)}/{total} {cell['seconds']:5.1f} s  {release.name}  {row.name}: "
                      f"{said[:300]}", flush=True)  # fmt: skip
            trial.close()

        with ThreadPoolExecutor(args.jobs) as pool:
            for future in [pool.submit(run, *each) for each in work if each[1]]:
                future.result()
        (args.out / "matrix.md").write_text(table(results.data) + "\n")
    print(table(results.data, merged=True))
    cells = [cell for cells in results.data["cells"].values() for cell in cells.values()]
    return int(any(cell["verdict"] == "defect" for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
