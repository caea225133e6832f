"""Pictures that compare runs, drawn by matplotlib; they are legible without colour."""

import itertools
import math
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_s3.report import settings
from megatron_s3.report.compare import about, adamw_label, best_rate, finalists, gaps, labels
from megatron_s3.report.disturbed import after, means, pairs
from megatron_s3.report.margins import margins
from megatron_s3.report.panels import (
    DARK,
    FAINT,
    Picture,
    colour_of,
    colour_unlike,
    draw_band,
    draw_legend,
    draw_line,
    extent,
    subplots,
)
from megatron_s3.report.runs import Suite, Trained
from megatron_s3.report.styles import styles

__all__ = ["pictures"]

#: The most spikes that are drawn.
SPIKES = 6
#: Iterations over which a recovery is smoothed.
SMOOTHED = 5
#: At most so many learning rates are written at an axis.
_TICKS = 8
#: The most labels whose updates are drawn.
_UPDATES = 4


def pictures(
    suites: Sequence[Suite], toys: Iterable[Mapping[str, Mapping[str, Any]]] = ()
) -> list[Picture]:
    """Returns all pictures of the runs.

    Args:
        suites: result of :func:`megatron_s3.report.runs.load`.
        toys: contents of the suites' ``toy.json``.
    """
    found: list[Picture | None] = [_toy(toy) for toy in toys]
    for suite in suites:
        for experiment, runs in suite.compared.items():
            found.append(_curves(suite, experiment, runs))
            found.append(_updates(suite, experiment, runs))
            found.append(_rates(suite, experiment, runs))
        found.append(_grid(suite))
        found.append(_overlaid(suite, "large rates", "times", "x {:g}"))
        found.append(_overlaid(suite, "burst", "burst", "gradient x {:g}"))
        found += [_margins(suite, size) for size in suite.sizes]
        found += [_settings(suite), *_recoveries(suite)]
        found += [_first_gradients(suite), _around_spikes(suite)]
    return [picture for picture in found if picture]


def _reference(runs: Sequence[Trained]) -> str:
    """Returns the label that each panel shows: AdamW's, or the first one without AdamW."""
    return adamw_label(runs) or labels(runs)[0]


def _smooth(run: Trained) -> list[tuple[int, float]]:
    """Returns the training losses, each averaged over up to 9 intervals."""
    loss = run.loss
    return [
        (loss[k][0], statistics.fmean(v for _, v in loss[max(0, k - 4) : k + 5]))
        for k in range(len(loss))
    ]


def _shown(runs: Sequence[Trained], label: str) -> list[Trained]:
    """Returns the runs at the best learning rate, or a running one if none has finished."""
    own = [run for run in runs if run.label == label and run.loss]
    return finalists(runs, label) or own[:1]


def _curves(suite: Suite, experiment: str, runs: Sequence[Trained]) -> Picture | None:
    """Draws the paper's figures 5 and 8: one panel for each label, and the reference in all."""
    if not any(run.loss for run in runs):
        return None
    reference = _reference(runs)
    others = [x for x in labels(runs) if x != reference and _shown(runs, x)] or [reference]
    drawn, panels = subplots(len(others), 3, (3.6, 2.9), sharex=True, sharey=True)
    for panel, label in zip(panels, others, strict=True):
        for name in dict.fromkeys((reference, label)):
            shown = _shown(runs, name)
            if not shown:
                continue
            line = "-" if name == label else "--"
            colour = (
                colour_unlike(label, reference) if name == label else colour_of(reference, DARK)
            )
            draw_band(panel, shown, _smooth, line, colour, f"{name}, learning rate {shown[0].lr:g}")
            for run in shown:
                mark = "o" if name == label else "x"
                draw_line(panel, run.valid, "none", marker=mark, color=colour, markersize=4)
        draw_legend(panel)
    late = (_smooth(run)[-len(run.loss) // 2 :] + run.valid[-1:] for run in runs)
    if ends := extent((v for series in late for _, v in series), 0.98):
        low, high = ends
        panels[0].set_ylim(low - 0.05, high + 0.6 * (high - low) + 0.1)
    seeds = any(len(_shown(runs, label)) > 1 for label in (reference, *others))
    title = f"{about(suite, experiment)}training loss" + (
        ", mean and range over seeds" if seeds else ""
    )
    if any(run.valid for run in runs):
        title += "; marks: validation loss"
    return Picture(
        f"{suite.name}-{experiment}-loss", title, drawn, _iteration(runs), "loss (nats per token)"
    )


def _iteration(runs: Sequence[Trained]) -> str:
    """Returns the name of the axis of iterations, with their tokens if all runs have as many."""
    sizes = {tokens for run in runs for tokens, _ in run.intervals}
    tokens = sizes.pop() if len(sizes) == 1 else math.nan
    return "iteration" if math.isnan(tokens) else f"iteration of {tokens:,.0f} tokens"


def _updates(suite: Suite, experiment: str, runs: Sequence[Trained]) -> Picture | None:
    """Draws largest and mean |u| and the learning rate, one column for each label."""
    shown = [x for x in labels(runs) if any(r.update("max_abs") for r in _shown(runs, x))]
    shown = shown[:_UPDATES]
    if not shown:
        return None
    drawn, panels = subplots(2 * len(shown), len(shown), (3.6, 2.1), sharex=True, sharey="row")
    for above, below, label in zip(panels, panels[len(shown) :], shown, strict=False):
        run = next(r for r in _shown(runs, label) if r.update("max_abs"))
        colour = colour_of(label, DARK)
        draw_line(above, run.update("max_abs"), color=colour, label="largest |u|")
        draw_line(above, run.update("mean_abs"), "--", color=colour, label="mean |u|")
        if run.bound is not None:
            above.axhline(run.bound, color="k", linewidth=0.8, linestyle=":",
                          label=f"bound {run.bound:g}")  # fmt: skip
        rates = [(r["iteration"], r["lr"]) for r in run.records if r.get("lr") is not None]
        draw_line(below, rates, color=colour)
        above.set_title(label, fontsize=8)
        draw_legend(above)
    panels[0].set_ylabel("|u| (learning rates)", fontsize=8)
    panels[len(shown)].set_ylabel("learning rate", fontsize=8)
    panels[len(shown)].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    title = f"{about(suite, experiment)}sizes of the updates u, and learning rate"
    return Picture(f"{suite.name}-{experiment}-updates", title, drawn, "iteration")


def _rates(suite: Suite, experiment: str, runs: Sequence[Trained]) -> Picture | None:
    """Draws the paper's figure 11: one panel for each label, with the others in grey."""
    ends = extent((run.final for run in runs), 0.9)
    if ends is None or len({(run.label, run.lr) for run in runs}) == len(labels(runs)):
        return None
    shown = labels(run for run in runs if run.finished)
    drawn, panels = subplots(len(shown), 3, (3.4, 2.5), sharey=True, sharex=True)
    rates = sorted({run.lr for run in runs if math.isfinite(run.final)})
    for panel, label in zip(panels, shown, strict=True):
        for other in (*(x for x in shown if x != label), label):
            own = [run for run in runs if run.label == other and math.isfinite(run.final)]
            seed = min(run.seed for run in own) if own else 0
            curve = sorted((run.lr, run.final) for run in own if run.seed == seed)
            style = {"color": colour_of(label, DARK), "marker": "o", "linewidth": 1.6}
            style |= {"zorder": 3, "markersize": 4}
            if other != label:
                style = {"color": FAINT, "linewidth": 0.8}
            draw_line(panel, curve, **style)
        final = [run for run in finalists(runs, label) if math.isfinite(run.final)]
        best = [(run.lr, run.final) for run in final]
        draw_line(panel, best, "none", marker="_", color=DARK, markersize=10)
        panel.set_xscale("log")
        panel.minorticks_off()
        if len(rates) <= _TICKS:
            panel.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=40, fontsize=7)
        panel.set_title(f"{label}: best at {best_rate(runs, label):g}", fontsize=8)
    panels[0].set_ylim(ends[0] - 0.05, ends[1] + 0.3)
    title = (
        f"{about(suite, experiment)}sensitivity to the learning rate; dashes: other seeds, "
        "grey: the other panels"
    )
    return Picture(
        f"{suite.name}-{experiment}-rates",
        title,
        drawn,
        "peak learning rate",
        "final validation loss (nats per token)",
    )


def _margins(suite: Suite, million: float) -> Picture | None:
    """Draws the loss of each label minus AdamW's by the tokens a parameter, of one model."""
    reference = _reference(suite.of_size(million))
    points = margins(suite, million, reference)
    shown = [label for label in points if label != reference]
    if not shown:
        return None
    drawn, (panel,) = subplots(1, 1, (6.4, 4.2))
    panel.axhline(0, color=DARK, linewidth=0.8)
    for k, (label, drawn_as) in enumerate(zip(shown, styles([reference, *shown])[1:], strict=True)):
        own = [(tokens, each) for tokens, each in points[label] if all(map(math.isfinite, each))]
        at = [tokens * 1.03 ** (k - len(shown) / 2) for tokens, _ in own]
        mean = [statistics.fmean(each) for _, each in own]
        low = [statistics.fmean(each) - min(each) for _, each in own]
        high = [max(each) - statistics.fmean(each) for _, each in own]
        panel.errorbar(at, mean, [low, high], linestyle=drawn_as.line, marker=drawn_as.marker,
                       color=drawn_as.colour, markersize=5, capsize=3, label=label)  # fmt: skip
    panel.set_xscale("log")
    every = sorted({tokens for known in points.values() for tokens, _ in known})
    panel.set_xlim(0.7 * every[0], 1.4 * every[-1])
    panel.set_xticks(every, [f"{tokens:g}" for tokens in every])
    panel.minorticks_off()
    draw_legend(panel)
    title = (
        f"{suite.name}, {million:.2g}M parameters: final loss minus that of {reference}, mean and "
        "range over seeds"
    )
    name = f"{suite.name}-{million:.2g}m-margins"
    return Picture(name, title, drawn, "tokens a parameter", "nats per token")


def _settings(suite: Suite) -> Picture | None:
    """Draws the loss of each label minus AdamW's, one panel for each setting that is varied."""
    of = []
    for experiment, by_setting in settings.varied(suite).items():
        every = [run for runs in by_setting.values() for run in runs]
        if (against := adamw_label(every)) is not None:
            of.append((experiment, by_setting, every, against))
    if not of:
        return None
    drawn, panels = subplots(len(of), 3, (3.4, 2.6), sharey=True)
    for panel, (experiment, by_setting, every, against) in zip(panels, of, strict=True):
        panel.axhline(0, color=DARK, linewidth=0.8)
        shown = [x for x in labels(r for r in every if "setting" in r.tags) if x != against]
        for label, drawn_as in zip(shown, styles(shown), strict=True):
            found = {k: gaps(finalists(runs, label), finalists(runs, against))
                     for k, runs in enumerate(by_setting.values())}  # fmt: skip
            mean = [(k, statistics.fmean(each)) for k, each in found.items()
                    if each and all(map(math.isfinite, each))]  # fmt: skip
            colour = drawn_as.colour
            draw_line(panel, mean, drawn_as.line, color=colour, linewidth=1.2, label=label)
            each = [(k, gap) for k, own in found.items() for gap in own if math.isfinite(gap)]
            draw_line(panel, each, "none", marker=drawn_as.marker, color=colour, markersize=4)
        names = [textwrap.fill(setting, 12) for setting in by_setting]
        panel.set_xticks(range(len(names)), names, fontsize=7)
        panel.set_title(experiment, fontsize=8)
    draw_legend(panels[0])
    title = f"{suite.name}: final loss minus that of AdamW with the same setting; marks: seeds"
    return Picture(f"{suite.name}-settings", title, drawn, "setting", "nats per token")


def _recoveries(suite: Suite) -> list[Picture]:
    """Draws the training loss after each disturbance minus that of the undisturbed run."""
    found = []
    for name, by_label in pairs(suite.of("robustness")).items():
        drawn, panels = subplots(len(by_label), 3, (3.4, 2.3), sharex=True, sharey=True)
        for panel, (label, own) in zip(panels, by_label.items(), strict=True):
            panel.axhline(0, color=DARK, linewidth=0.6)
            for (without, run), line in zip(own, itertools.cycle(("-", "--", ":"))):
                curve = means(after(without, run), SMOOTHED)
                text = f"seed {run.seed}" if len(own) > 1 else None
                panel.plot(
                    curve, linestyle=line, color=colour_of(label, DARK), linewidth=1.2, label=text
                )
            panel.set_title(label, fontsize=8)
        if len(panels[0].lines) > 2:
            draw_legend(panels[0])
        title = (
            f"{suite.name}, {name}: training loss minus that of the undisturbed run, mean of "
            f"{SMOOTHED} iterations"
        )
        found.append(Picture(
            f"{suite.name}-recovery-{name.replace(' ', '-')}", title, drawn,
            "iterations after the disturbance", "nats per token",
        ))  # fmt: skip
    return found


def _grid(suite: Suite) -> Picture | None:
    """Draws the paper's figure 9."""
    cells = {(run.tags["p"], run.tags["beta"]): run.final for run in suite.of("grid")}
    if not cells:
        return None
    ps, betas = sorted({p for p, _ in cells}), sorted({b for _, b in cells})
    values = [[cells.get((p, b), math.nan) for b in betas] for p in ps]
    drawn, (panel,) = subplots(1, 1, (4.6, 3.4))
    panel.imshow(values, cmap="Greys", aspect="auto", alpha=0.6)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            panel.text(j, i, f"{value:.3f}", ha="center", va="center")
    panel.grid(False)
    panel.set_xticks(range(len(betas)), [f"{b:g}" for b in betas])
    panel.set_yticks(range(len(ps)), [f"{p:g}" for p in ps])
    panel.set_xlabel("beta")
    panel.set_ylabel("p")
    title = f"{suite.name}: S3's final validation loss by p and beta"
    return Picture(f"{suite.name}-grid", title, drawn)


def _overlaid(suite: Suite, name: str, tag: str, words: str) -> Picture | None:
    """Draws the runs of each label of an experiment, which differ in a tag, in one panel."""
    runs = suite.of(name)
    if not runs:
        return None
    shown = labels(runs)
    drawn, panels = subplots(len(shown), 3, (3.6, 2.9), sharex=True, sharey=True)
    for panel, label in zip(panels, shown, strict=True):
        own = sorted((r for r in runs if r.label == label), key=lambda r: r.tags[tag])
        colour = colour_of(label, DARK)
        for run, line in zip(own, ("-", "--", ":"), strict=False):
            text = f"{words.format(run.tags[tag])}, learning rate {run.lr:g}"
            draw_line(panel, run.loss, line, color=colour, linewidth=1.2, label=text)
            for spike in run.spikes:
                panel.axvline(spike["onset"], color=FAINT, linewidth=3, zorder=0)
        panel.set_title(label, fontsize=8)
        draw_legend(panel)
    if ends := extent((v for run in runs for _, v in run.loss), 0.97):
        panels[0].set_ylim(ends[0] - 0.1, ends[1] + 0.3)
    title = f"{suite.name}, {name}: training loss; grey bars: spikes found"
    return Picture(
        f"{suite.name}-{name}", title, drawn, "iteration", "training loss (nats per token)"
    )


def _first_gradients(suite: Suite) -> Picture | None:
    """Draws the paper's figure 2: gradient norms by layer and parameter type at the start."""
    for run in suite.runs:
        first = next((r for r in run.records if r["kind"] == "train" and r.get("updates")), None)
        if first:
            break
    else:
        return None
    drawn, panels = subplots(2, 2, (4.4, 3.2), sharey=True)
    parts = [
        {
            key: float(s["grad_rms"]) * math.sqrt(s["numel"])
            for key, s in first["updates"][of].items()
        }
        for of in ("layers", "kinds")
    ]
    for panel, norms, what in zip(panels, parts, ("layer", "parameter type"), strict=True):
        panel.bar(range(len(norms)), list(norms.values()), color="0.75", edgecolor="k", width=0.7)
        panel.set_xticks(range(len(norms)), list(norms), rotation=40, ha="right", fontsize=7)
        panel.set_xlabel(what, fontsize=8)
        panel.set_yscale("log")
    panels[0].set_ylabel("norm of the gradient", fontsize=8)
    title = (
        f"{about(suite)}gradient norms of the first {first['iteration']} iterations, {run.label}"
    )
    return Picture(f"{suite.name}-first-gradients", title, drawn)


def _around_spikes(suite: Suite) -> Picture | None:
    """Draws the paper's figure 3: loss, mean and largest |u| around the highest spikes."""
    found = [(float(s["height"]), run, s) for run in suite.runs for s in run.spikes]
    found = sorted((f for f in found if f[1].update("mean_abs")), key=lambda f: -f[0])[:SPIKES]
    if not found:
        return None
    drawn, panels = subplots(2 * len(found), 2, (5.4, 1.7))
    for k, (height, run, spike) in enumerate(found):
        reach = max(20, run.iterations // 8)
        begin, end = spike["onset"] - reach, (spike.get("end") or spike["onset"]) + reach
        loss, update = panels[2 * k], panels[2 * k + 1]
        colour = colour_of(run.label, DARK)
        for panel, series, line, name in (
            (loss, run.loss, "-", "training loss"),
            (update, run.update("mean_abs"), "-", "mean |u|"),
            (update, run.update("max_abs"), "--", "largest |u|"),
        ):
            near = [(i, v) for i, v in series if begin <= i <= end]
            draw_line(panel, near, line, color=colour, linewidth=1.2, label=name)
        if run.bound is not None:
            update.axhline(run.bound, color="k", linewidth=0.8, linestyle=":", label="bound")
        update.set_ylim(0, 1.15 * max(1, update.dataLim.ymax))
        for panel in (loss, update):
            panel.axvline(spike["onset"], color=FAINT, linewidth=3, zorder=0)
            draw_legend(panel, 6, loc="upper left")
        tag = "".join(
            f", {key} {value if isinstance(value, str) else f'{value:g}'}"
            for key, value in run.tags.items()
        )
        first = ", ".join(spike.get("first") or []) or "-"
        loss.set_title(
            f"{run.label}, learning rate {run.lr:g}{tag}: +{height:.2f} nats",
            fontsize=7,
            loc="left",
        )
        update.set_title(f"rose first: {first}", fontsize=6, loc="left")
    title = f"{about(suite)}loss and updates around the highest spikes; grey: onset"
    return Picture(f"{suite.name}-spikes", title, drawn)


def _toy(found: Mapping[str, Mapping[str, Any]]) -> Picture:
    """Draws the paper's figure 1."""
    drawn, panels = subplots(3 * len(found), 3, (4.0, 3.0))
    for k, (noise, runs) in enumerate(found.items()):
        path_of, loss, update = panels[3 * k : 3 * k + 3]
        for (label, run), own in zip(runs.items(), styles(list(runs)), strict=True):
            style = {"linestyle": own.line, "color": own.colour, "linewidth": 1.2}
            path_of.plot(*zip(*run["x"], strict=True), **style)
            loss.plot(run["loss"], label=f"{label}, learning rate {run['lr']:.2g}", **style)
            update.plot(run["update"], **style)
        path_of.plot(math.sqrt(20), 1 / math.sqrt(20), "k*", markersize=9)
        path_of.set_xlim(0.5, 6)
        path_of.set_ylim(0, 1.3)
        path_of.set_title(f"{noise}: trajectories, the star is the minimum", fontsize=8)
        loss.set_title(f"{noise}: loss", fontsize=8)
        update.set_title(f"{noise}: mean |u|", fontsize=8)
        loss.set_yscale("log")
        update.set_yscale("log")
        draw_legend(loss, 6)
    title = (
        "f = (x - 1/y)^2 / 2 + (x - 20 y)^2 / 2 from (1, 1), each at the best of 9 constant "
        "learning rates"
    )
    return Picture("toy", title, drawn)
