"""Tables and pictures of runs of several settings and lengths, whose logs are written here."""

import json
import math

import pytest

from megatron_s3.report import __main__ as verb
from megatron_s3.report import margins, settings
from megatron_s3.report.runs import load
from megatron_s3.report.tables import tables as every_table
from scripts.experiments import record
from scripts.experiments.suite import Run

from .logs import row, write

pytest.importorskip("matplotlib")
from megatron_s3.report.pictures import pictures

USUAL = "0.12M parameters x 10 tokens"


def varied(out):
    """S3 is 0.1 better than AdamW as usual, and 0.2 worse with the batch 64 and a larger rate."""
    of = [(USUAL, {"million": 0.12, "tokens": 10.0}, 0.2, -0.1)]
    of += [("batch size", {"setting": "64"}, 0.4, 0.2), ("batch size", {"setting": "8"}, 0.1, 0.0)]
    for experiment, tags, best, gap in of:
        for label in ("S3", "AdamW"):
            for lr in (0.1, 0.2, 0.4):
                for seed in (1, 2) if lr == best else (1,):
                    final = 2 + abs(math.log(lr / best)) + (gap * seed if label == "S3" else 0)
                    run = Run(experiment, label, "", lr, seed, tags)
                    write(out / run.key, label, lr, seed, final, tags=tags, experiment=experiment,
                          test=final - 0.5)  # fmt: skip
    return out


def test_a_setting_is_compared_at_its_own_best_learning_rate(tmp_path) -> None:
    runs = load([varied(tmp_path / "length")])
    (table,) = settings.tables(runs)
    assert table.title == "length, batch size: loss with other settings"
    assert [cells[0] for cells in table.rows] == ["8", "16", "64"]
    assert row(table, "64") == {
        "batch size": "64", "AdamW": "1.5000", "its learning rate": "0.4", "S3": "1.8000",
        "minus AdamW": "+0.300 +- 0.141", "seeds": "2",
    }  # fmt: skip
    assert row(table, "16")["minus AdamW"] == "-0.150 +- 0.071"
    assert row(table, "8")["minus AdamW"] == "+0.000 +- 0.000"
    drawn = {picture.name: picture for picture in pictures(runs)}
    panel = drawn["length-settings"].figure.axes[0]
    mean, marks = panel.lines[1:3]
    assert list(mean.get_ydata()) == pytest.approx([0, -0.15, 0.3])
    assert list(marks.get_ydata()) == pytest.approx([0, 0, -0.1, -0.2, 0.2, 0.4])


def test_settings_without_adamw_are_compared_with_nothing(tmp_path) -> None:
    for label, optimizer in (("S3", "s3"), ("Lion", "lion")):
        run = Run("batch size", label, "", 0.1, 1, {"setting": "64"})
        write(tmp_path / "length" / run.key, label, 0.1, 1, 2.0, tags=run.tags,
              experiment=run.experiment, optimizer=optimizer)  # fmt: skip
    runs = load([tmp_path / "length"])
    (table,) = settings.tables(runs)
    rates = ["2.0000", "0.1"] * 2
    assert table.headings == ["batch size", "S3", "its learning rate", "Lion", "its learning rate"]
    assert table.rows == [["64", *rates]]
    assert "length-settings" not in {picture.name for picture in pictures(runs)}


def test_settings_of_any_optimizer_are_drawn(tmp_path) -> None:
    """Lion's line has dashes of its own."""
    for label, optimizer in (("AdamW", "adamw"), ("Lion", "lion")):
        run = Run("batch size", label, "", 0.1, 1, {"setting": "64"})
        write(tmp_path / "length" / run.key, label, 0.1, 1, 2.0, tags=run.tags,
              experiment=run.experiment, optimizer=optimizer)  # fmt: skip
    drawn = {picture.name: picture for picture in pictures(load([tmp_path / "length"]))}
    assert len(drawn["length-settings"].figure.axes[0].lines) == 3


def test_a_spike_of_a_run_with_another_setting_is_drawn(tmp_path) -> None:
    """A setting may be words."""
    run = Run("schedule", "S3", "", 0.1, 1, {"setting": "constant"})
    write(tmp_path / "length" / run.key, "S3", 0.1, 1, 2.0, tags=run.tags, spike=50,
          experiment=run.experiment)  # fmt: skip
    drawn = {picture.name: picture for picture in pictures(load([tmp_path / "length"]))}
    title = drawn["length-spikes"].figure.axes[0].get_title(loc="left")
    assert title == "S3, learning rate 0.1, setting constant: +0.50 nats"


def test_suites_of_one_name_are_told_apart(tmp_path, capsys) -> None:
    places = [tmp_path / "a" / "suite", tmp_path / "b" / "suite"]
    for place in places:
        write(place / "optimizers/0", "S3", 0.1, 1, 2.0, experiment="optimizers")
    output = tmp_path / "report"
    assert verb.main([*map(str, places), "--output", str(output)]) == 0
    pages = [f"{name}-optimizers-loss.png"
             for name in ("suite", "-".join(places[1].resolve().parts[1:]).lower())]  # fmt: skip
    assert {path.name for path in output.glob("*-optimizers-loss.png")} == set(pages)


def test_a_report_without_other_settings_has_no_table_of_them(tmp_path) -> None:
    runs = load([write(tmp_path / "run", "S3", 0.1, 1, 2.0)])
    assert settings.tables(runs) == [] and margins.tables(runs) == []


@pytest.mark.parametrize("model", margins.MODELS)
def test_an_extrapolation_finds_the_line_it_was_made_from(model) -> None:
    def line(tokens: float) -> float:
        return 0.01 + 0.02 * margins.MODELS[model](tokens)

    points = [(tokens, [line(tokens) - 0.001, line(tokens) + 0.001]) for tokens in (10, 20, 100)]
    found = margins.extrapolated(points, model, 1000)
    assert found is not None and found.value == pytest.approx(line(1000), abs=1e-12)
    # The textbook's error: s^2 = 6e-6 / 4, and the leverage of the new point.
    xs = [margins.MODELS[model](tokens) for tokens in (10, 20, 100)]
    middle = sum(xs) / 3
    leverage = (margins.MODELS[model](1000) - middle) ** 2 / (
        2 * sum((x - middle) ** 2 for x in xs)
    )
    assert found.error == pytest.approx(math.sqrt(1.5e-6 * (1 / 6 + leverage)), rel=1e-9)
    assert margins.extrapolated(points[:2], model, 1000) is None
    assert margins.extrapolated([(n, gaps[:1]) for n, gaps in points], model, 1000) is None


def test_margins_are_extrapolated_from_three_lengths(tmp_path) -> None:
    for tokens, gap in ((10, 0.03), (20, 0.02), (40, 0.01)):
        tags = {"million": 0.12, "tokens": float(tokens)}
        for seed in (1, 2):
            for label, loss in (("AdamW", 2.0), ("S3", 2.0 - gap)):
                run = Run(f"x {tokens}", label, "", 0.1, seed, tags)
                write(tmp_path / "length" / run.key, label, 0.1, seed, loss, 10 * tokens,
                      experiment=run.experiment, tags=tags)  # fmt: skip
    (table,) = margins.tables(load([tmp_path / "length"]))
    assert table.title == "length, 0.12M parameters: loss minus that of AdamW, extrapolated"
    (first, second) = table.rows
    assert first[:2] == ["S3", "log(tokens)"] and second[:2] == ["S3", "1 / sqrt(tokens)"]
    # The margin falls by 0.01 a doubling: 0.01 - 0.01 * log2(10) = -0.023 of a tenfold length.
    assert first[2:] == ["-0.010 +- 0.000", "+0.023 +- 0.000", "10: 2, 20: 2, 40: 2"]
    assert table.headings[2:4] == ["40 tokens a parameter", "400 tokens a parameter"]


def test_every_margin_is_extrapolated_to_the_lengths_of_the_headings(tmp_path) -> None:
    """Also that of an optimizer whose longest run is shorter."""
    for tokens in (10, 20, 40, 80):
        tags = {"million": 0.12, "tokens": float(tokens)}
        for label in ("AdamW", "S3", "S3, ramp")[: 2 if tokens == 80 else 3]:
            for seed in (1, 2):
                run = Run(f"x {tokens}", label, "", 0.1, seed, tags)
                loss = 2.0 if label == "AdamW" else 2 - 0.01 * math.log2(tokens)
                write(tmp_path / "length" / run.key, label, 0.1, seed, loss, 10 * tokens,
                      experiment=run.experiment, tags=tags)  # fmt: skip
    (table,) = margins.tables(load([tmp_path / "length"]))
    assert table.headings[2:4] == ["80 tokens a parameter", "800 tokens a parameter"]
    cells = {(line[0], line[1]): line[2:] for line in table.rows}
    ends = ["-0.063 +- 0.000", "-0.096 +- 0.000"]  # 0.01 * log2(80), and of 800
    assert cells["S3", "log(tokens)"] == [*ends, "10: 2, 20: 2, 40: 2, 80: 2"]
    assert cells["S3, ramp", "log(tokens)"] == [*ends, "10: 2, 20: 2, 40: 2"]


@pytest.mark.parametrize("diverged", [["S3"], ["AdamW"], ["S3", "AdamW"]], ids=" and ".join)
def test_a_seed_that_diverged_is_said_and_not_left_out(tmp_path, diverged) -> None:
    of = [(f"x {n}", {"million": 0.12, "tokens": float(n)}, 10 * n) for n in (10, 20, 40)]
    for experiment, tags, iterations in [*of, ("batch size", {"setting": "64"}, 100)]:
        for label in ("S3", "AdamW"):
            for seed in (1, 2):
                run = Run(experiment, label, "", 0.1, seed, tags)
                bad = seed == 2 and label in diverged and tags.get("tokens") != 10
                write(tmp_path / "length" / run.key, label, 0.1, seed, 2.0, iterations, tags=tags,
                      experiment=experiment, test="nan" if bad else 1.5)  # fmt: skip
    runs = load([tmp_path / "length"])
    (table,) = margins.tables(runs)
    assert [line[2:4] for line in table.rows] == [["diverged"] * 2] * 2
    (table,) = settings.tables(runs)
    assert row(table, "64")["minus AdamW"] == "diverged" and row(table, "64")["seeds"] == "2"
    assert row(table, "16")["minus AdamW"] == "+0.000 +- 0.000"
    drawn = {picture.name: picture for picture in pictures(runs)}
    mean, marks = drawn["length-settings"].figure.axes[0].lines[1:3]
    assert list(mean.get_xdata()) == [0] and list(marks.get_xdata()) == [0, 0, 1]
    (bars,) = drawn["length-0.12m-margins"].figure.axes[0].containers
    assert list(bars[0].get_ydata()) == [0.0]


def test_a_disturbed_seed_that_diverged_is_said(tmp_path) -> None:
    for seed in (1, 2):
        for burst in (1.0, 1000.0):
            run = Run("robustness", "S3", "", 0.1, seed, {"burst": burst})
            folder = write(tmp_path / "robust" / run.key, "S3", 0.1, seed, 2.0, tags=run.tags,
                           experiment=run.experiment)  # fmt: skip
            if burst > 1 and seed == 2:
                log = folder / "metrics.jsonl"
                log.write_text(log.read_text().replace('"loss": 2.0', '"loss": "nan"'))
    (table,) = [t for t in every_table(load([tmp_path / "robust"])) if "disturb" in t.title]
    cells = row(table, "S3: gradient x 1000")
    assert cells["difference at the end"] == "diverged" and cells["seeds"] == "2"


def test_usual_runs_are_those_on_as_many_samples(tmp_path) -> None:
    """A shorter length and another model are in the folder too."""
    out = varied(tmp_path / "length")
    for million, tokens, iterations in ((0.12, 5.0, 50), (0.8, 10.0, 100)):
        tags = {"million": million, "tokens": tokens}
        for label, loss in (("S3", 1.0), ("AdamW", 3.0)):
            run = Run(f"{million}M x {tokens:g}", label, "", 0.1, 1, tags)
            write(out / run.key, label, 0.1, 1, loss, iterations, experiment=run.experiment,
                  tags=tags)  # fmt: skip
    (table,) = settings.tables(load([out]))
    assert row(table, "16")["minus AdamW"] == "-0.150 +- 0.071"
    for each in out.glob("0.12M-parameters*"):
        each.rename(tmp_path / each.name)
    (table,) = settings.tables(load([out]))
    assert [cells[0] for cells in table.rows] == ["8", "64"]


def test_runs_of_a_report_are_restored_with_the_same_tables(tmp_path, capsys) -> None:
    out = varied(tmp_path / "length")
    assert verb.main([str(out), "--output", str(tmp_path / "first")]) == 0
    again = tmp_path / "again" / "length"
    assert record.restore(tmp_path / "first/report.json", again, 600, []) == 24
    assert record.restore(tmp_path / "first/report.json", again, 600, []) == 0
    assert sorted(p.relative_to(again) for p in again.glob("*/*/run.json")) == sorted(
        p.relative_to(out) for p in out.glob("*/*/run.json")
    )

    def kept(folder):
        return [
            [[cell for head, cell in zip(table.headings, cells, strict=True) if "|u|" not in head]
             for cells in table.rows]
            for table in every_table(load([folder]))
        ]  # fmt: skip

    assert kept(again) == kept(out)


def test_what_is_no_report_is_not_restored(tmp_path) -> None:
    file = tmp_path / "report.json"
    for text in ("{", "[1]", '[{"runs": [{"label": "S3"}]}]'):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"report.json: not a report.json of experiments"):
            record.restore(file, tmp_path / "out", 600, [])
    with pytest.raises(ValueError, match=r"none\.json"):
        record.restore(tmp_path / "none.json", tmp_path / "out", 600, [])
    assert not (tmp_path / "out").exists()
    folder = write(tmp_path / "run", "S3", 0.1, 1, 2.0, until=50)
    assert verb.main([str(folder), "--output", str(tmp_path / "report")]) == 0
    known = tmp_path / "report/report.json"
    assert record.restore(known, tmp_path / "out", 100, []) == 0  # not finished
    assert json.loads((tmp_path / "report/report.json").read_text())[0]["runs"][0]["start"] == {
        "global_batch_size": 8, "seq_length": 4,
    }  # fmt: skip


def test_runs_of_another_length_or_model_are_not_restored(tmp_path) -> None:
    run = Run("optimizers", "S3", "", 0.1, 1)
    write(tmp_path / "suite" / run.key, "S3", 0.1, 1, 2.0, experiment="optimizers")
    assert verb.main([str(tmp_path / "suite"), "--output", str(tmp_path / "report")]) == 0
    known = tmp_path / "report/report.json"
    with pytest.raises(ValueError, match=r"its runs have 100 iterations, these 600: they cannot"):
        record.restore(known, tmp_path / "out", 600, [])
    flags = ["--hidden-size", "128"]
    with pytest.raises(ValueError, match="these \\['--hidden-size', '128'\\]: they cannot"):
        record.restore(known, tmp_path / "out", 100, flags)
    assert not (tmp_path / "out").exists()
    assert record.restore(known, tmp_path / "out", 100, []) == 1


def test_a_run_that_was_not_evaluated_at_its_end_is_not_restored(tmp_path) -> None:
    run = Run("optimizers", "S3", "", 0.1, 1)
    log = write(tmp_path / "suite" / run.key, "S3", 0.1, 1, 2.0, experiment="optimizers")
    kept = [line for line in (log / "metrics.jsonl").open() if '"valid"' not in line]
    (log / "metrics.jsonl").write_text("".join(kept))
    assert verb.main([str(tmp_path / "suite"), "--output", str(tmp_path / "report")]) == 0
    assert record.restore(tmp_path / "report/report.json", tmp_path / "out", 100, []) == 0
