#!/usr/bin/env python3
"""Compares the loss after a switch from AdamW to S3 with that of AdamW continued.

    python -m scripts.experiments.switch_optimizer [--at 200] [--iters 350] [--lr 6e-4] [--out DIR]

The runs train the quickstart's model on the bytes of Python's standard library, with one rank,
bf16, and a constant learning rate after a warmup. AdamW trains to iteration --at. From its
checkpoint three kinds of runs continue on the same samples: AdamW, S3 with the state that
`megatron-s3 convert` makes from AdamW's, and S3 with the weights alone (--no-load-optim). S3's
learning rate is 3 or 10 times AdamW's; the paper uses 10 from the start of a training. lr *
weight_decay stays constant. The script writes switch_optimizer.json, .txt and .png to DIR, and
skips runs that are finished there.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from megatron_s3 import data
from megatron_s3.checkpoints import convert, rates
from megatron_s3.report.styles import styles
from scripts.experiments import model
from tests.harness import trainer
from tests.harness.runs import Run

WARMUP = 20
#: Ratios of S3's learning rate to AdamW's.
FACTORS = (10.0, 3.0)
LR_TIMES_DECAY = 3e-5
#: Ranges of steps after the switch; losses are averaged over each.
WINDOWS = ((1, 3), (4, 10), (11, 30), (31, 75), (76, 150))


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--at", type=int, default=200, help="iteration of the switch")
    parser.add_argument("--iters", type=int, default=350, help="iterations in all")
    parser.add_argument("--lr", type=float, default=6e-4, help="AdamW's learning rate")
    parser.add_argument("--out", type=Path, default=Path("runs/switch-optimizer"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    prefix = str(args.out / "text")
    data.build(data.source("stdlib", "text", None), prefix, tokenizer="bytes", overwrite=True)
    adamw = args.out / "adamw"
    start = ["--save", adamw, "--save-interval", args.at, "--exit-interval", args.at]
    before = train(args, prefix, "before", None, start)
    after = {"AdamW goes on": train(args, prefix, "AdamW goes on", None, ["--load", adamw])}
    for factor in FACTORS:
        converted = args.out / f"converted-{factor:g}"
        if not converted.exists():
            convert.convert(adamw, converted, "s3", iteration=args.at, lr_factor=factor)
        for name, flags in (
            (f"S3, state converted, {factor:g} x lr", ["--load", converted]),
            (f"S3, weights alone, {factor:g} x lr", ["--load", adamw, "--no-load-optim"]),
        ):
            after[name] = train(args, prefix, name, factor, flags)
    result = {"at": args.at, "lr": args.lr, "before": before, "after": after}
    (args.out / "switch_optimizer.json").write_text(json.dumps(result, indent=1) + "\n")
    text = table(before, after, args)
    (args.out / "switch_optimizer.txt").write_text(text + "\n")
    print(text)
    draw(before, after, args)
    return 0


def train(
    args: argparse.Namespace, prefix: str, name: str, factor: float | None, flags: list
) -> dict[str, float]:
    """Trains a run unless it is finished, and returns its losses by iteration.

    Args:
        args: the arguments of the command.
        prefix: the prefix of the dataset's files.
        name: the name of the run.
        factor: the ratio of S3's learning rate to AdamW's; None to train with AdamW.
        flags: other flags of Megatron.
    """
    log = args.out / f"{name.replace(', ', '-').replace(' ', '-')}.log"
    if not (log.is_file() and log.read_text().endswith("finished\n")):
        lr = rates.scaled(args.lr, factor or 1.0)
        decay = rates.over(LR_TIMES_DECAY, args.lr)
        words = model.words(
            "S3" if factor else "AdamW",
            args.iters,
            *("plugin_log_updates=null", f"lr={lr}", "lr_times_weight_decay=null"),
            f"weight_decay={rates.over(decay, factor or 1.0)}",
        )
        at = words.index("--lr-warmup-fraction")
        # With --no-load-optim Megatron restarts the schedule; a second warmup is not wanted.
        warmup = "0" if "--no-load-optim" in flags else str(WARMUP)
        words[at : at + 2] = ["--lr-warmup-iters", warmup]
        words += ["--lr-decay-style", "constant"]
        words += ["--log-interval", "1", "--eval-interval", "100000", "--eval-iters", "1"]
        words += [*data.megatron_arguments(prefix), *map(str, flags)]
        print(f"{name}: {args.iters} iterations at most, {log}", flush=True)
        trainer.train(*words, tiny=False, threads=None, log=log)
        with log.open("a") as file:
            file.write("finished\n")
    losses = Run(0, log.read_text()).losses
    return {str(iteration): float(loss) for iteration, loss in losses.items()}


def table(before: dict, after: dict, args: argparse.Namespace) -> str:
    """Returns a table of mean losses over ranges of steps after the switch."""
    windows = [w for w in WINDOWS if args.at + w[0] <= args.iters]
    last = statistics.mean(v for i, v in before.items() if int(i) > args.at - 10)
    heads = [f"{one}-{two}" for one, two in windows]
    rows = [
        f"AdamW's mean loss over the 10 steps before the switch, at {args.at}: {last:.3f} nats",
        f"{'steps after the switch':34}" + "".join(f"{head:>9}" for head in heads) + "  largest",
    ]
    for name, losses in after.items():
        means = [
            statistics.mean(v for i, v in losses.items() if one <= int(i) - args.at <= two)
            for one, two in windows
        ]
        rows.append(
            f"{name:34}" + "".join(f"{x:9.3f}" for x in means) + f"{max(losses.values()):9.3f}"
        )
    return "\n".join(rows)


def draw(before: dict, after: dict, args: argparse.Namespace) -> None:
    """Writes switch_optimizer.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    late = {int(i): v for i, v in before.items() if int(i) >= args.at - 100}
    adamw, s3 = styles(["AdamW", "S3"])
    _curve(axes, late, adamw.colour, "-", "AdamW")
    for name, losses in after.items():
        if name.startswith("AdamW"):
            colour, line = adamw.colour, adamw.line
        else:  # the lower learning rate is lighter
            colour = s3.colour if "10 x" in name else "#7799BB"
            line = "-" if "state" in name else (0, (2, 1))
        _curve(axes, {int(i): v for i, v in losses.items()}, colour, line, name)
    axes.axvline(args.at, color="#888888", linewidth=0.8, linestyle=":")
    axes.set(
        xlabel="iteration",
        ylabel="training loss (nats per byte, mean of 5 steps)",
        title=f"AdamW at lr {args.lr:g}, switched to S3 after {args.at} steps",
    )
    axes.legend(frameon=False)
    figure.savefig(args.out / "switch_optimizer.png", dpi=120)


def _curve(axes, losses: dict[int, float], colour: str, line, label: str) -> None:
    values = [*losses.values()]
    means = [statistics.mean(values[max(0, n - 4) : n + 1]) for n in range(len(values))]
    axes.plot([*losses], means, color=colour, linestyle=line, linewidth=1.2, label=label)


if __name__ == "__main__":
    sys.exit(main())
