"""Tables, pictures and the page of runs whose logs are written here."""

import json
import math
import re
import sys
from pathlib import Path

import pytest

from megatron_s3.report import __main__ as verb
from megatron_s3.report import runs as runs_module
from megatron_s3.report.runs import RunError, load
from megatron_s3.report.tables import tables as every_table
from megatron_s3.version import __version__
from scripts.bench import spikes as confusion

from .logs import named, row, write

pytest.importorskip("matplotlib")
from megatron_s3.report.pictures import pictures


def suite(out: Path, iterations: int = 100, better: float = 0.0) -> Path:
    """S3 is 0.1, 0.2 and 0.3 better than AdamW, seed by seed, at the middle one of three rates."""
    for k, (label, gain) in enumerate((("S3", 0.1), ("AdamW", 0.0))):
        for lr in (0.1, 0.2, 0.4):
            for seed in (1, 2, 3) if lr == 0.2 else (1,):
                final = 2.0 - better - gain * seed + abs(lr - 0.2)
                name = f"optimizers/{k}-{lr}-{seed}"
                more = {"experiment": "optimizers", "spike": 50 * (seed == 2 and k == 1)}
                write(out / name, label, lr, seed, final, iterations, **more)
    return out


def test_the_runs_in_a_folder(tmp_path) -> None:
    """As the quickstart and arrays leave them; the quickstart has a run.json of its own."""
    for name in ("s3", "adamw"):
        folder = write(tmp_path / "quickstart" / name, name, 0.1, 1, 2.0)
        (folder / "run.json").write_text('{"plan": {}, "finished": true}')
    (tmp_path / "quickstart" / "data").mkdir()
    (runs,) = load([tmp_path / "quickstart"])
    assert [run.label for run in runs.runs] == ["adamw", "s3"]
    (alone,) = load([tmp_path / "quickstart" / "s3"])
    assert [run.label for run in alone.runs] == ["s3"]
    (tmp_path / "quickstart" / "s3" / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run.json: not a run of scripts/reproduce.sh"):
        load([tmp_path / "quickstart" / "s3"])
    write(tmp_path / "tiny", "S3", 0.1, 1, 2.0)
    (tmp_path / "quickstart" / "s3" / "run.json").write_text('{"plan": {}, "finished": true}')
    (above,) = load([tmp_path])
    assert [run.folder.name for run in above.runs] == ["tiny"]
    with pytest.raises(RunError, match=r"data: neither it nor a folder in it has a metrics.jsonl"):
        load([tmp_path / "quickstart" / "data"])


def test_a_launched_run_without_a_log_is_said(tmp_path, capsys) -> None:
    """A run of an array may fail before its training."""
    write(tmp_path / "runs" / "1", "S3", 0.1, 1, 2.0)
    (tmp_path / "runs" / "2").mkdir()
    (tmp_path / "runs" / "2" / "config.yaml").touch()
    (tmp_path / "runs" / "data").mkdir()
    assert verb.main([str(tmp_path / "runs"), "--output", str(tmp_path / "report")]) == 0
    (said,) = capsys.readouterr().err.splitlines()
    assert said == f"warning: {tmp_path / 'runs' / '2'}: a run without a metrics.jsonl; left out"


def test_final_losses_and_their_differences_seed_by_seed(tmp_path) -> None:
    table = named(every_table(load([suite(tmp_path / "a")])), "final validation loss")
    s3 = row(table, "S3")
    assert (s3["learning rate"], s3["learning rates tried"], s3["seeds"]) == (
        "0.2",
        "3, 0.1 to 0.4",
        "3",
    )
    assert (s3["loss"], s3["s.d."]) == ("1.8000", "0.1000")
    assert s3["loss minus that of AdamW"] == "-0.200 +- 0.100"
    assert (s3["largest |u|"], s3["bound of |u|"]) == ("0.600", "1")
    assert row(table, "AdamW")["loss minus that of S3"] == "+0.200 +- 0.100"
    assert [cells[0] for cells in table.rows] == ["S3", "AdamW"]


def test_a_recipe_is_compared_with_s3_itself_and_with_adamw_of_its_kind(tmp_path) -> None:
    of = {"optimizers": {"S3": 2.0, "AdamW": 2.5},
          "recipes": {"S3, ramp": 1.8, "AdamW, warmup 30 %": 2.4}}  # fmt: skip
    for experiment, losses in of.items():
        for label, loss in losses.items():
            folder = tmp_path / "a" / experiment / label
            write(folder, label, 0.1, 1, loss, experiment=experiment)
    table = named(every_table(load([tmp_path / "a"])), "recipes: final validation loss")
    s3 = row(table, "S3, ramp")
    assert s3["loss minus that of AdamW, warmup 30 %"] == "-0.600"
    assert s3["loss minus that of S3"] == "-0.200"
    assert sum("minus" in head for head in table.headings) == 2


def test_a_spike_is_counted_in_10000_iterations(tmp_path) -> None:
    table = named(every_table(load([suite(tmp_path / "a")])), "loss spikes")
    assert row(table, "adamw")["spikes per 10,000 iterations"] == "20.00"  # 1 in 5 runs of 100
    assert row(table, "s3")["spikes"] == "0"
    assert row(table, "s3")["OLMo-core score"] == row(table, "s3")["OLMo 2 score"] == "0.00"


def test_megatrons_own_adam_is_what_others_are_compared_with(tmp_path) -> None:
    """The shipped configurations of AdamW have ``optimizer: adam``."""
    runs = [write(tmp_path / f"{label}{n}", label, 0.1, 1, loss, n, optimizer=label.lower())
            for label, loss in (("S3", 2.0), ("adam", 2.5)) for n in (100, 200)]  # fmt: skip
    found = every_table(load(runs[::2]))
    assert row(named(found, "final"), "S3")["loss minus that of adam"] == "-0.500"
    equal = named(every_table(load(runs)), "the steps of adam to the same loss")
    assert row(equal, "S3")["200 iterations"] == "2.0000 (> 1.00)"


def test_runs_of_several_lengths_are_no_seeds_of_one_row(tmp_path) -> None:
    runs = load([
        write(tmp_path / f"{label}-{n}", label, 0.1, 1, loss, n)
        for n, loss in ((100, 2.0), (200, 1.0)) for label in ("S3", "AdamW")
    ])  # fmt: skip
    for n, loss in ((100, "2.0000"), (200, "1.0000")):
        table = named(every_table(runs), f"{n} iterations: final validation loss after {n}")
        assert row(table, "S3")["loss"] == loss and row(table, "S3")["seeds"] == "1"
        assert row(table, "S3")["loss minus that of AdamW"] == "+0.000"
    drawn = [picture.name for picture in pictures(runs)]
    assert len(set(drawn)) == len(drawn) and "runs-100-iterations-loss" in drawn


def test_runs_of_one_seed_are_no_seeds_of_one_row(tmp_path) -> None:
    """They differ in a weight decay that the learning rate does not explain, or in nothing."""
    folders = [write(tmp_path / str(k), "S3", 0.1, 1, 2.0) for k in range(3)]
    log = folders[0] / "metrics.jsonl"
    log.write_text(log.read_text().replace('"weight_decay": 0.01', '"weight_decay": 0.5'))
    again = [folders[1], folders[2] / "metrics.jsonl"]  # the same runs
    table = named(every_table(load([*again, *folders])), "final")
    a, b = (f"S3, weight_decay 0.01 ({folder})" for folder in folders[1:])
    assert {cells[0] for cells in table.rows} == {"S3, weight_decay 0.5", a, b}
    assert {cells[-1] for cells in table.rows} == {"1"}
    scaled = [write(tmp_path / f"rate{k}", "S3", lr, 1, 2.0) for k, lr in enumerate((0.2, 0.4))]
    for folder, decay in zip(scaled, ("0.02", "0.04"), strict=True):
        log = folder / "metrics.jsonl"
        log.write_text(log.read_text().replace('"weight_decay": 0.01', f'"weight_decay": {decay}'))
    assert row(named(every_table(load(scaled)), "final"), "S3")["learning rates tried"] == (
        "2, 0.2 to 0.4"
    )


def test_a_run_whose_length_or_rate_is_unknown_is_reported(tmp_path) -> None:
    """A program with its own loop need not tell its length; another may log no learning rate."""
    for name, old, new in (("length", '"train_iters": 100', '"train_iters": null'),
                           ("rate", '"lr": 0.1', '"lr": null')):  # fmt: skip
        log = write(tmp_path / name, "S3", 0.1, 1, 2.0) / "metrics.jsonl"
        log.write_text(log.read_text().replace(old, new))
        table = named(every_table(load([tmp_path / name])), "final")
        assert table.title == "final validation loss after 100 iterations"
        assert row(table, "S3")["loss"] == "2.0000"
    log = write(tmp_path / "begun", "S3", 0.1, 1, 2.0, until=40) / "metrics.jsonl"
    log.write_text(log.read_text().replace('"train_iters": 100', '"train_iters": null'))
    assert row(named(every_table(load([log])), "not finished"), str(log))["iterations"] == "40"


def test_a_run_that_goes_on_for_longer_is_that_of_its_last_launch(tmp_path) -> None:
    """The first launch ended after 100 iterations, and was tested there; the next has 200."""
    log = write(tmp_path / "run", "S3", 0.1, 1, 2.0, test=1.5) / "metrics.jsonl"
    longer = write(tmp_path / "longer", "S3", 0.1, 1, 1.0, 200) / "metrics.jsonl"
    lines = [json.loads(line) for line in longer.read_text().splitlines()]
    again = [line for line in lines if line.get("iteration", 0) > 100]
    for end, finished in ((150, False), (200, True)):
        more = [{**lines[0], "iteration": 100}]
        more += [line for line in again if line["iteration"] <= end]
        path = tmp_path / str(end) / "metrics.jsonl"
        path.parent.mkdir()
        path.write_text(log.read_text() + "".join(f"{json.dumps(line)}\n" for line in more))
        (run,) = load([path.parent])[0].runs
        assert (run.iterations, run.reached, run.finished) == (200, end, finished)
        assert run.final == 1.0 or not finished
        assert math.isnan(run.test)


def test_a_suite_is_reported_once_and_has_pictures_of_its_own(tmp_path) -> None:
    paths = [suite(tmp_path / name) for name in ("Big", "big")]
    found = load([*paths, paths[0] / ".." / "Big"])
    assert [found[0].name, len(found)] == ["Big", 2]
    names = [picture.name for picture in pictures(found)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("at", [2, 9])
def test_a_largest_update_that_is_nan_is_not_hidden(at: int, tmp_path) -> None:
    log = write(tmp_path / "run", "S3", 0.1, 1, 2.0) / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[at]["updates"]["all"]["max_abs"] = "nan"
    log.write_text("\n".join(map(json.dumps, lines)))
    runs = load([log])
    assert row(named(every_table(runs), "final validation loss"), "S3")["largest |u|"] == "nan"
    assert '"max_abs_update": "nan"' in verb._json(runs)


def test_a_validation_loss_is_not_compared_with_a_test_loss(tmp_path) -> None:
    """The first run was tested at its end, and the other was killed before."""
    write(tmp_path / "s3", "S3", 0.1, 1, 2.0, test=1.5)
    log = write(tmp_path / "adamw", "AdamW", 0.1, 1, 2.1) / "metrics.jsonl"
    table = named(every_table(load([tmp_path])), "final validation loss")
    assert row(table, "S3")["loss"] == "2.0000"
    assert row(table, "S3")["loss minus that of AdamW"] == "-0.100"
    assert "Some runs have no test loss, so validation losses are compared." in table.note
    with log.open("a") as file:
        file.write('{"kind": "test", "iteration": 100, "loss": 1.7}\n')
    table = named(every_table(load([tmp_path])), "final test loss")
    assert row(table, "S3")["loss minus that of AdamW"] == "-0.200"
    assert "no test loss" not in table.note
    write(tmp_path / "longer", "S3", 0.1, 1, 1.9, 200)
    equal = named(every_table(load([tmp_path])), "the steps of AdamW")
    assert row(equal, "S3")["100 iterations"].startswith("2.0000")


def test_many_runs_are_told_apart_in_no_time(tmp_path, monkeypatch) -> None:
    """An array of runs: what a run differs in is found without comparing each with each."""
    for k in range(100):
        write(tmp_path / str(k), "S3", 0.1, k, 2.0, beta=0.9 if k % 2 else 0.95)
    calls = []
    settings = runs_module._settings
    monkeypatch.setattr(runs_module, "_settings", lambda run: calls.append(run) or settings(run))
    (found,) = load([tmp_path])
    assert {run.label for run in found.runs} == {"S3, beta 0.9", "S3, beta 0.95"}
    assert len(calls) <= 300


def test_a_dollar_sign_in_a_name_is_no_formula(tmp_path) -> None:
    for k, name in enumerate(("$lr_$seed", "x$^$")):
        write(tmp_path / name, "S3", 0.1, 1, 2.0 + k)
    out = ["--output", str(tmp_path / "report")]
    assert verb.main([str(tmp_path / "$lr_$seed"), str(tmp_path / "x$^$"), *out]) == 0


@pytest.mark.parametrize("peak", ["0", "nan", "inf"])
def test_a_peak_that_is_no_speed_is_refused(peak: str, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        verb.main([str(tmp_path), "--peak-tflops", peak])
    assert f"--peak-tflops {peak} must be greater than 0" in capsys.readouterr().err


def test_speed_and_mfu(tmp_path) -> None:
    """8 x 4 tokens and 4e12 operations on 2 ranks in 0.5 s, the median of the intervals."""
    folder = write(tmp_path / "run", "S3", 0.1, 1, 2.0)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[0] |= {"flops": 4e12, "world_size": 2}
    for k, line in enumerate(r for r in lines if r["kind"] == "train"):
        line["seconds"] = None if k == 0 else (0.5 if k < 8 else 5.0)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    table = named(every_table(load([folder]), 20), "speed")
    assert row(table, "S3") == {
        "run": "S3", "ms per iteration": "500.0", "tokens per second": "64", "ranks": "2",
        "TFLOP/s per rank": "4", "MFU, % of 20": "20.0", "runs": "1",
    }  # fmt: skip
    assert not any("speed" in t.title for t in every_table(load([suite(tmp_path / "a")])))


def test_the_speed_of_a_run_whose_batch_grows(tmp_path) -> None:
    """8 samples at first, and 16 from iteration 21 on, in twice the time."""
    folder = write(tmp_path / "run", "S3", 0.1, 1, 2.0)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[0] |= {"flops": 4e12, "world_size": 1}
    tokens = 0
    for k, line in enumerate(r for r in lines if r["kind"] == "train"):
        tokens += 10 * 4 * (8 if k < 2 else 16)
        line |= {"tokens": tokens, "seconds": None if k == 0 else (0.5 if k < 2 else 1.0)}
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    runs = load([folder])
    table = row(named(every_table(runs), "speed"), "S3")
    assert (table["ms per iteration"], table["tokens per second"]) == ("1,000.0", "64")
    assert table["TFLOP/s per rank"] == "8"
    curves = next(picture for picture in pictures(runs) if picture.name.endswith("loss"))
    assert curves.figure.get_supxlabel() == "iteration"


def test_runs_of_other_batches_and_ranks_have_speeds_of_their_own(tmp_path) -> None:
    for k, (samples, ranks, setting) in enumerate([(8, 1, "8"), (64, 1, "64"), (64, 2, "64")]):
        more = {"tags": {"setting": setting}, "experiment": "batch size"}
        folder = write(tmp_path / f"a/batch-size/{k}", "S3", 0.1, k, 2.0, **more)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        lines[0] |= {"global_batch_size": samples, "world_size": ranks}
        for line in lines:
            line |= {"seconds": 0.5} if line["kind"] == "train" else {}
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    table = named(every_table(load([tmp_path / "a"])), "speed")
    assert [(row[0], row[2], row[3]) for row in table.rows] == [
        ("S3, batch size 8", "64", "1"), ("S3, batch size 64", "512", "1"),
        ("S3, batch size 64", "512", "2"),
    ]  # fmt: skip


def test_steps_to_equal_loss_take_whole_schedules(tmp_path) -> None:
    """AdamW ends at 2.0 after 100 and at 1.5 after 400 iterations: at 1.75 after 200."""
    folders = [suite(tmp_path / "a"), suite(tmp_path / "b", 400, better=0.5)]
    for out, iterations in zip(folders, (100, 400), strict=True):
        for seed in (1, 2, 3):
            name = out / f"optimizers/mid-{seed}"
            write(name, "S3 mid", 0.2, seed, 1.75, iterations, experiment="optimizers")
    table = named(every_table(load(folders)), "the steps of AdamW to the same loss")
    assert row(table, "S3 mid") == {
        "run": "S3 mid", "100 iterations": "1.7500 (2.00)", "400 iterations": "1.7500 (0.50)",
    }  # fmt: skip
    assert row(table, "S3")["400 iterations"] == "1.3000 (> 1.00)"


def test_runs_are_in_the_order_of_the_numbers_in_their_names(tmp_path) -> None:
    for bound in (10, 2, 1.5):
        for folder in ("suite/optimizers", "alone"):
            more = {"experiment": "optimizers"} if "suite" in folder else {}
            write(tmp_path / folder / f"bound-{bound}", f"S3, bound {bound}", 0.1, 1, 2.0, **more)
    for suite in load([tmp_path / "suite", tmp_path / "alone"]):
        assert [run.folder.name for run in suite.runs] == ["bound-1.5", "bound-2", "bound-10"]


def test_a_report_of_one_run_says_nothing_of_what_it_lacks(tmp_path) -> None:
    """No rate was chosen, nothing is compared, and there is one seed."""
    table, *_ = every_table(load([write(tmp_path / "run", "S3", 0.1, 1, 2.0)]))
    assert table.title == "final validation loss after 100 iterations"
    assert table.headings == [
        "run",
        "learning rate",
        "loss",
        "largest |u|",
        "bound of |u|",
        "seeds",
    ]
    assert table.note == (
        "Losses are in nats per token. |u| is the absolute value of an update divided by the "
        "learning rate."
    )
    running = load([write(tmp_path / "running", "S3", 0.1, 1, 2.0, until=40)])
    assert not any("final" in table.title for table in every_table(running))


def test_what_diverged_is_no_best_and_no_number(tmp_path) -> None:
    for lr, final in ((0.1, 2.0), (0.2, math.nan)):
        write(tmp_path / f"a/optimizers/{lr}", "S3", lr, 1, final, experiment="optimizers")
    table = named(every_table(load([tmp_path / "a"])), "final validation loss")
    assert row(table, "S3")["learning rate"] == "0.1"


def test_burst_and_grid(tmp_path) -> None:
    for burst, final in ((1.0, 2.0), (1000.0, 2.5)):
        more = {"experiment": "burst", "tags": {"burst": burst}}
        write(tmp_path / f"a/burst/{burst}", "S3", 0.1, 1, final, **more)
    for p in (2, 3):
        more = {"experiment": "grid", "tags": {"p": p, "beta": 0.9}}
        write(tmp_path / f"a/grid/{p}", f"S3, p={p}", 0.1, 1, float(p), **more)
    tables = every_table(load([tmp_path / "a"]))
    burst = row(named(tables, "1000 times too large"), "S3")
    assert (burst["difference"], burst["rise"]) == ("+0.5000", "0.500")
    assert burst["iterations to recover"] == "not in this run"
    assert named(tables, "by p and beta").rows == [["2", "2.0000"], ["3", "3.0000"]]


def test_a_rate_that_is_too_large_stands_beside_the_best_one(tmp_path) -> None:
    """Only the same seed is compared, and a rate that is not finished has no loss."""
    for seed, loss in ((1, 2.0), (2, 2.1)):
        write(tmp_path / f"a/optimizers/{seed}", "S3", 0.1, seed, loss, experiment="optimizers")
    for times, until in ((3.0, 100), (10.0, 50)):
        more = {"experiment": "large rates", "tags": {"times": times}, "until": until}
        write(tmp_path / f"a/large-rates/{times}", "S3", 0.1 * times, 2, 2.4, spike=50, **more)
    table = named(every_table(load([tmp_path / "a"])), "rates that are too large")
    assert row(table, "S3") == {
        "run": "S3", "best learning rate": "2.1000", "x 3": "2.4000", "x 10": "-",
        "spikes at x 3": "1", "spikes at x 10": "1",
    }  # fmt: skip


def test_runs_of_a_launch_are_told_apart_by_what_differs(tmp_path) -> None:
    for k, beta in enumerate((0.9, 0.95)):
        write(tmp_path / f"{k}/tensorboard", "S3", 0.1, 1, 2.0, beta=beta)
    write(tmp_path / "2", "S3", 0.1, 1, 2.0, until=40, beta=0.95)
    (found,) = load([tmp_path / str(k) for k in range(3)])
    assert [run.label for run in found.runs] == ["S3, beta 0.9", "S3, beta 0.95", "S3, beta 0.95"]
    assert [run.finished for run in found.runs] == [True, True, False]
    assert "40 of 100" in str(named(every_table([found]), "not finished"))


def test_runs_with_rules_of_their_own_are_no_seeds_of_the_others(tmp_path) -> None:
    """--plugin-overrides, which the first record holds."""
    for seed, rules in ((1, []), (2, ["*bias: lr=0.1"]), (3, None)):
        log = write(tmp_path / str(seed), "S3", 0.1, seed, 1.0 + seed) / "metrics.jsonl"
        first, rest = log.read_text().split("\n", 1)
        log.write_text(json.dumps(json.loads(first) | {"overrides": rules}) + "\n" + rest)
    table = named(every_table(load([tmp_path])), "final validation loss")
    assert row(table, "S3, overrides None")["loss"] == "3.0000"
    assert row(table, "S3, overrides '*bias: lr=0.1'")["loss"] == "3.0000"


@pytest.mark.filterwarnings("error")  # such as that of a legend without labels
@pytest.mark.parametrize("final", [2.0, math.nan])
@pytest.mark.parametrize("until", [0, 40, 100])
def test_runs_that_are_not_finished_or_diverged_are_reported(tmp_path, final, until) -> None:
    """Every experiment, before its first loss, in the middle and at its end."""
    both = ({"tags": {"times": 3.0, "burst": 1.0, "p": 2, "beta": 0.9}},
            {"tags": {"times": 10.0, "burst": 1000.0, "p": 3, "beta": 0.9}})  # fmt: skip
    names = ("optimizers", "grid", "large rates", "burst", "robustness")
    for name in names:
        for k, more in enumerate(both):
            folder = tmp_path / "suite" / name / str(k)
            write(folder, "S3", 0.1 + k, 1, final, until=until, experiment=name, **more)
    alone = [write(tmp_path / str(lr), "S3", lr, 1, final, until=until) for lr in (0.1, 0.2)]
    runs = load([tmp_path / "suite", *alone])
    tables = every_table(runs)
    listed = [cells for table in tables if "not finished" in table.title for cells in table.rows]
    assert len(listed) == (12 if until < 100 else 0)
    if until == 0:
        assert [cells[1:] for cells in listed] == [["0 of 100", "-"]] * 12
    losses = [cells[-1] for cells in listed]  # those of a run that diverges are said
    text = "".join(str(table) for table in tables if "not finished" not in table.title)
    assert ("nan" not in text and "nan" not in losses) or (until, str(final)) == (40, "nan")
    for picture in pictures(runs):
        picture.figure.canvas.draw()


def test_the_page_stands_alone(tmp_path, capsys) -> None:
    words = [str(suite(tmp_path / "a")), "--output", str(tmp_path / "report")]
    assert verb.main(words) == 0
    page = (tmp_path / "report/report.html").read_text()
    names = {file.stem for file in (tmp_path / "report").glob("*.png")}
    drawn = ("optimizers-loss", "optimizers-rates", "optimizers-updates", "first-gradients")
    assert names == {f"a-{n}" for n in (*drawn, "spikes")}
    assert page.count("data:image/png;base64,") == 5 and 'src="a-' not in page
    assert "-0.200 +- 0.100" in page and "-0.200 +- 0.100" in capsys.readouterr().out
    assert "<h1>Training runs: S3, AdamW</h1>" in page and "name=viewport" in page
    assert "chosen on the same validation data" in page
    command = " ".join(["megatron-s3 report", *words])
    assert f"with <code>{command}</code>" in page and f"megatron_s3 {__version__}" in page
    links, targets = re.findall(r'href="#(p\d+)"', page), re.findall(r"id=(p\d+)", page)
    assert links == targets and len(links) == page.count("<table>") + 5
    (read,) = json.loads((tmp_path / "report/report.json").read_text())
    assert len(read["runs"]) == 10 and read["runs"][0]["valid"][-1][0] == 100


def test_a_long_title_is_not_cut(tmp_path) -> None:
    """Each picture with the title above it, drawn."""
    for k, p in enumerate((2, 3)):
        more = {"experiment": "grid", "tags": {"p": p, "beta": 0.9}}
        write(tmp_path / f"a-suite-of-a-rather-long-name/grid/{k}", "S3", 0.1, 1, 2.0, **more)
    runs = [write(tmp_path / "run", "S3 (SoftSignSGD)", 0.1, 1, 2.0, spike=50)]
    for picture in pictures(load([*runs, tmp_path / "a-suite-of-a-rather-long-name"])):
        figure = picture.figure
        figure.canvas.draw()
        box = figure._suptitle.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width, picture.title
        assert box.y1 <= figure.bbox.height, picture.title
        assert " ".join(figure.get_suptitle().split()) == picture.title


@pytest.mark.parametrize("text", [None, "", '{"kind": "train", "iteration": 1}\n'])
def test_what_is_no_run_is_named(tmp_path, text, capsys) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(RunError, match=str(tmp_path)):
        load([tmp_path])
    assert verb.main([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_damaged_log_is_named_and_a_cut_line_is_said(tmp_path, capsys) -> None:
    log = write(tmp_path / "run", "S3", 0.1, 1, 2.0) / "metrics.jsonl"
    good = log.read_bytes()
    out = ["--output", str(tmp_path / "report")]
    for damage, said in (
        (good.replace(b'"train"', b'"tr\xffin"', 1), "not UTF-8 at byte"),
        (good.replace(b'{"kind": "train", "iteration": 30', b"\0" * 40, 1), "line 4: damaged"),
        (good + b"[1, 2]\n", "damaged: not a record"),
        (good.replace(b'"kind": "train"', b'"kjnd": "train"', 1), "line 2: damaged"),
        (good.replace(b'"train_iters"', b'"train_ite2s"', 1), "line 1: damaged"),
        (good.replace(b'"iteration": 10,', b'"iteration": "10",', 1), "line 2: damaged"),
        (good.replace(b'"iteration": 20', b'"iterat\\u0000n": 20', 1), "line 3: damaged"),
        (good.replace(b'"max_abs"', b'"max_bbs"', 1), "line 2: damaged"),
        (good + b'{"kind": "valid", "iteration": 100, "loss": null}\n', "line 14: damaged"),
        (good + b'{"kind": "spike", "onset": 30}\n', "line 14: damaged"),
    ):
        log.write_bytes(damage)
        assert verb.main([str(tmp_path / "run"), *out]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "report").exists()
    log.write_bytes(good[:-20])
    assert verb.main([str(tmp_path / "run"), *out]) == 0
    last = good.count(b"\n")
    assert capsys.readouterr().err == (
        f"warning: {log}, line {last}: cut off; the report leaves this record out\n"
    )


def test_a_damaged_file_of_a_suite_is_named(tmp_path, capsys) -> None:
    suite(tmp_path / "a")
    words = [str(tmp_path / "a"), "--output", str(tmp_path / "report")]
    for name, text in (("suite.json", "{"), ("toy.json", '{"a": '),
                       ("optimizers/0-0.1-1/run.json", "[1]")):  # fmt: skip
        path = tmp_path / "a" / name
        kept = path.read_text() if path.exists() else "{}"
        path.write_text(text)
        assert verb.main(words) == 2
        assert f"error: {path}: not a " in capsys.readouterr().err
        path.write_text(kept)
    (tmp_path / "a" / "toy.json").unlink()
    assert verb.main(words) == 0


def test_what_is_not_finite_is_text_in_the_json(tmp_path) -> None:
    log = write(tmp_path / "run", "S3", 0.1, 1, math.nan) / "metrics.jsonl"
    text = log.read_text().replace('"max_abs": 0.51', '"max_abs": "nan"')
    log.write_text(text.replace('"lr": 0.1', '"lr": null'))
    assert verb.main([str(tmp_path / "run"), "--output", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report/report.json").read_text()
    (suite,) = json.loads(text, parse_constant=lambda name: pytest.fail(f"not JSON: {name}"))
    assert suite["runs"][0]["lr"] is None and suite["runs"][0]["max_abs_update"] == "nan"


def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    tmp_path, capsys, monkeypatch
) -> None:
    run = str(write(tmp_path / "run", "S3", 0.1, 1, 2.0))
    (tmp_path / "file").touch()
    monkeypatch.setattr(verb, "load", lambda runs: pytest.fail("the work began"))
    for output in ("/proc/none/report", tmp_path / "file", tmp_path / "file/below"):
        assert verb.main([run, "--output", str(output)]) == 2
        told = capsys.readouterr()
        assert told.out == "" and told.err.count("\n") == 1
        assert told.err.startswith(f"error: --output {output}: cannot be written (")


def test_the_tables_are_printed_before_anything_is_written(tmp_path, capsys, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(verb, "_write", full)
    run = str(write(tmp_path / "run", "S3", 0.1, 1, 2.0))
    assert verb.main([run, "--output", str(tmp_path / "report")]) == 2
    told = capsys.readouterr()
    assert "2.0000" in told.out
    assert "No space left on device" in told.err and told.err.count("\n") == 1


def test_without_matplotlib_the_tables_come_and_what_is_missing_is_said(
    tmp_path, capsys, monkeypatch
) -> None:
    for name in ["matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))]:
        monkeypatch.setitem(sys.modules, name, None)
    run = str(write(tmp_path / "run", "S3", 0.1, 1, 2.0))
    assert verb.main([run, "--output", str(tmp_path / "report")]) == 2
    told = capsys.readouterr()
    assert "2.0000" in told.out and "pip install matplotlib" in told.err


def test_the_detectors_table_names_what_is_no_report(tmp_path, capsys) -> None:
    (tmp_path / "text").write_text("not JSON")
    (tmp_path / "other.json").write_text('[{"a": 1}]')
    for name, said in (("none", "cannot be read"), ("text", "not a report.json"),
                       ("other.json", "not a report.json")):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            confusion.main([str(tmp_path / name)])
        assert stopped.value.code == 2
        assert f"{tmp_path / name}: {said}" in capsys.readouterr().err


def lengths(out: Path) -> Path:
    """S3 is 0.2, then 0.1 below AdamW on the test text; its best rate is another on that text."""
    for tokens, iterations, gain in ((20, 100, 0.2), (100, 500, 0.1)):
        for label in ("S3", "AdamW"):
            for lr in (0.1, 0.2, 0.4):
                for seed in (1, 2) if lr == 0.2 else (1,):
                    test = 2.5 - tokens / 100 - gain * (label == "S3") - (lr == 0.4) + seed / 100
                    more = {"tags": {"million": 0.12, "tokens": tokens}, "test": test}
                    more["experiment"] = f"0.12M parameters x {tokens} tokens"
                    name = f"{tokens}/{label}-{lr}-{seed}"
                    write(out / name, label, lr, seed, 2 + abs(lr - 0.2), iterations, **more)
    return out


def test_a_rate_is_chosen_by_one_text_and_the_other_is_reported(tmp_path) -> None:
    runs = load([lengths(tmp_path / "length")])
    found = every_table(runs)
    titles = [f"length, 0.12M parameters x {n} tokens: final test loss" for n in (20, 100)]
    for title, gain, loss in zip(titles, ("-0.200", "-0.100"), ("2.1150", "1.4150"), strict=True):
        s3 = row(named(found, title), "S3")
        assert s3["learning rate"] == "0.2" and s3["loss"] == loss
        assert s3["loss minus that of AdamW"] == f"{gain} +- 0.000"
    assert "not the test data" in named(found, titles[0]).note
    equal = named(found, "length: 0.12M parameters, final loss and the steps of AdamW")
    assert row(equal, "S3")["100 iterations"].startswith("2.1150 (")
    times = math.exp(math.log(5) * 0.2 / 0.8)
    assert row(equal, "S3")["100 iterations"] == f"2.1150 ({times:.2f})"
    drawn = {picture.name: picture for picture in pictures(runs)}
    panel = drawn["length-0.12m-margins"].figure.axes[0]
    assert panel.containers[0].lines[0].get_ydata() == pytest.approx([-0.2, -0.1])
    assert {f"length-0.12m-parameters-x-{n}-tokens-{what}" for n in (20, 100)
            for what in ("loss", "rates", "updates")} <= set(drawn)  # fmt: skip


def test_a_recovery_is_measured_against_the_undisturbed_run(tmp_path) -> None:
    """Ten corrupted batches are left out; what comes after them is counted."""
    # The loss falls before it rises, which is no recovery.
    rows = (("S3", 1000.0, 0.0, 20), ("S3", 1.0, 10.0, 0), ("S3", 1.0, 0.0, 0))
    for label, burst, corrupted, high in rows:
        more = {"experiment": "robustness", "tags": {"burst": burst, "corrupted": corrupted}}
        folder = write(tmp_path / f"robustness/{burst}-{corrupted}", label, 0.1, 1, 2.0, **more)
        lines = [line for line in (folder / "metrics.jsonl").read_text().splitlines()
                 if '"train"' not in line]  # fmt: skip
        for i in range(1, 101):
            loss = 2.0 + 1.0 * (50 <= i < 50 + corrupted) + 0.5 * (50 < i <= 50 + high)
            loss -= 12.0 * (i == 51 and high > 0)
            lines.append(json.dumps({"kind": "train", "iteration": i, "loss": loss}))
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    runs = load([tmp_path])
    table = named(every_table(runs), "disturbances in the middle")
    burst = row(table, "S3: gradient x 1000")
    assert (burst["rise"], burst["area"]) == ("+0.50", "-2.0")
    assert burst["iterations to recover"] == "20"
    corrupted = row(table, "S3: 10 corrupted batches")
    assert (corrupted["rise"], corrupted["area"]) == ("+0.00", "+0.0")
    assert corrupted["iterations to recover"] == "0"
    names = {picture.name for picture in pictures(runs)}
    assert {name for name in names if "recovery" in name} == {
        f"{tmp_path.name}-recovery-{what}" for what in ("gradient-x-1000", "10-corrupted-batches")
    }
