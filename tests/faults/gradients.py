"""Gradients that are not finite or too large on one rank."""

import itertools
import re
from pathlib import Path

from tests.faults.bench import S3, Bench, latest
from tests.faults.rows import Row
from tests.harness.runs import Run
from tests.harness.tensors import same, tensors

__all__ = ["gradients"]


def gradients(bench: Bench) -> list[Row]:
    """Spoiled on rank 1 before they are reduced, in one step or in five."""
    iters, at = 60, 20
    rows: list[Row] = []
    optimizers = {
        "s3": S3,
        "s3, grad bound 10": [*S3, "--s3-grad-bound", "10"],
        "adamw, clip 1.0": ["--optimizer", "adamw"],
        "adamw, no clip": ["--optimizer", "adamw", "--clip-grad", "0"],
    }
    schedule = ["--train-iters", iters, "--lr-warmup-iters", 5, "--lr", "3e-3", "--bf16"]
    schedule += ["--use-distributed-optimizer", "--save-interval", iters]
    unchecked = ["--no-check-for-nan-in-loss-and-grad"]
    for name, flags in list(optimizers.items())[: bench.args.optimizers]:
        normal = bench.run(*flags, *schedule).losses
        for value in ("nan", "inf", "1e30", "x1000")[: bench.args.optimizers]:
            for checked in (False, True)[: bench.args.optimizers]:
                row = Row(f"{name}: {value} on one rank{'' if checked else ', unchecked'}")
                save = bench.new("gradients")
                run = bench.run(
                    *flags, *schedule, *([] if checked else unchecked), "--save", save,
                    hook=f"{value}@{at}-{at}",
                )  # fmt: skip
                row.add(**_spoiled(run, normal, save, at, iters))
                row.notes = row.tries[0]["how"]
                row.progress()
                rows.append(row)
    rows.append(_storm(bench))
    return rows


def _spoiled(run: Run, normal: dict[int, str], save: Path, at: int, iters: int) -> dict:
    nans = states = 0  # values that are not finite, of parameters and of the state
    if saved := latest(save):
        for name, tensor in tensors(save, saved).items():
            count = int((~tensor.isfinite()).sum())
            if re.search(r"\.exp_|momentum", name):
                states += count
            else:
                nans += count
    said = re.findall(
        r"number of nan iterations: +[1-9]|lm loss: NAN|lm loss of iteration \d+ is not finite",
        run.log,
    )
    if run.returncode:
        # Megatron's rerun state machine repeats the step, saves what was before it, and exits.
        found = re.findall(
            r"Unexpected result (\S+) on rank (\d+) .*?message='(.*?)( for|')", run.log
        )
        why = f"rank {found[0][1]}: {found[0][2]}" if found else run.error[:100]
        how = f"said and ended with status {run.returncode}, iteration {saved} saved ({why})"
        ok = why and saved == at - 1 and not nans
        return {"outcome": "survived" if ok else "lost", "how": how, "nans": nans}
    worse = {
        i: float(loss) - float(normal[i])
        for i, loss in run.losses.items()
        if i > at and i in normal
    }
    largest = max(worse.values(), default=0.0)
    back = next((i for i in sorted(worse) if all(worse[j] < 0.02 for j in worse if j >= i)), None)
    if nans or iters not in worse:
        how = f"{nans:,} values of the checkpoint not finite; " + (
            f"the log says {said[0]!r}" if said else "the log does not say so"
        )
    elif back:
        how = f"loss at most {largest:+.3f}, back within 0.02 after {back - at} steps"
    else:
        how = f"loss at most {largest:+.3f}, {worse[iters]:+.3f} at the end"
    if states and not nans:
        how += f"; {states:,} values of the state are not finite, parameters all are"
    silent = (nans or iters not in worse) and not said
    return {"outcome": "falsely_accepted" if silent else "survived", "how": how}


def _storm(bench: Bench) -> Row:
    row = Row("fp16: inf on one rank in 5 steps")
    for name, flags in {"sharded": ["--use-distributed-optimizer"], "whole": []}.items():
        save = bench.new("storm")
        run = bench.run(
            *S3, "--fp16", "--initial-loss-scale", 1024, "--hysteresis", 1, *flags,
            "--train-iters", 12, "--save", save, "--save-interval", 1, hook="inf@5-9",
        )  # fmt: skip
        skipped = [int(n) for n in re.findall(r"skipped iterations: +(\d+)", run.log)]
        states = [tensors(save, i) for i in range(4, 13)] if latest(save) == 12 else []
        # The loss scale is among what is saved, but not among the tensors.
        still = all(same(states[0], s) for s in states[1:6])
        moves = [not same(a, b) for a, b in itertools.pairwise(states[5:])]
        ok = run.returncode == 0 and skipped[4:9] == [1] * 5 and states and still and all(moves)
        row.add("survived" if ok else "lost", layout=name, skipped=skipped, moves=moves)
        row.progress()
    row.notes = "skipped on both ranks, state and parameters bitwise as before, then on"
    return row
