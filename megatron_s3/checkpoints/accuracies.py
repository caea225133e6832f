"""Accuracies of models on the paper's tasks as a table and as a figure: Figure 6."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_s3.checkpoints.tasks import TASKS
from megatron_s3.report.panels import spell_out
from megatron_s3.report.styles import styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Results", "figure", "table"]

#: A model's results by task: the metrics of lm-evaluation-harness, with ``samples``, ``acc`` and
#: ``acc_stderr`` among them.
Results = Mapping[str, Mapping[str, Any]]


def table(models: Mapping[str, Results]) -> str:
    """Returns Figure 6 as a Markdown table: accuracy in percent, ± its standard error.

    Args:
        models: the results by the models' names, all for the same tasks.
    """
    tasks = list(next(iter(models.values())))
    rows = [
        ["model", *(TASKS[task].label for task in tasks)],
        ["---", *("--:" for _ in tasks)],
    ]
    for name, results in models.items():
        rows.append([name.replace("|", "\\|"), *(_percent(results[task]) for task in tasks)])
    samples = next(iter(models.values()))
    rows.append(["samples", *(str(samples[task]["samples"]) for task in tasks)])
    rows.append(["chance", *(f"{100 / TASKS[task].choices:.1f}" for task in tasks)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    )


def _percent(result: Mapping[str, Any]) -> str:
    error = result.get("acc_stderr")
    return f"{100 * result['acc']:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def figure(models: Mapping[str, Results]) -> "Figure":
    """Draws Figure 6 as bars: accuracy of each model on each task, its standard error, chance.

    Args:
        models: the results by the models' names, all for the same tasks.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(next(iter(models.values())))
    bars = len(tasks) * len(models)
    drawn = Figure(figsize=(max(5.0, 2 + 0.5 * bars), 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots()
    width = 0.8 / len(models)
    looks = styles(list(models))
    for number, (name, results) in enumerate(models.items()):
        at = [i + (number - (len(models) - 1) / 2) * width for i in range(len(tasks))]
        heights = [100 * results[task]["acc"] for task in tasks]
        errors = [100 * (results[task].get("acc_stderr") or 0) for task in tasks]
        axes.bar(
            at,
            heights,
            width,
            yerr=errors,
            capsize=2,
            label=name,
            color=looks[number].colour,
            hatch=looks[number].hatch,
            edgecolor="white",
        )
        for x, height, error in zip(at, heights, errors, strict=True):
            axes.annotate(
                f"{height:.1f}",
                (x, height + error),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize="small",
            )
    for i, task in enumerate(tasks):
        chance = 100 / TASKS[task].choices
        label = "chance" if i == 0 else None
        axes.plot([i - 0.45, i + 0.45], [chance] * 2, color="black", linestyle="--", label=label)
    axes.set_xticks(range(len(tasks)), [TASKS[task].label for task in tasks])
    axes.set_ylabel("accuracy (%), zero-shot")
    axes.set_ylim(0, 108)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    drawn.legend(loc="outside upper center", ncols=5, frameon=False)
    spell_out(drawn)
    return drawn
