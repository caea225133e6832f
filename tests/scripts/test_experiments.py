"""Which runs there are, from which results; the real trainer on two of them."""

import contextlib
import json
import multiprocessing
import sys
from pathlib import Path

import pytest
import torch

from scripts.experiments import runner, suite, toy
from scripts.experiments.suite import Run, best_rate, plan


def finished(runs: list[Run], loss) -> dict[str, float]:
    return {run.key: loss(run) for run in runs}


def rates(label: str, runs: list[Run]) -> list[float]:
    found = {r.lr for r in runs if r.label == label and r.experiment == "optimizers"}
    return sorted(found)


def everything(loss, rounds: int = 10) -> tuple[list[Run], dict[str, float]]:
    results: dict[str, float] = {}
    for _ in range(rounds):
        runs = plan(results)
        new = finished([r for r in runs if r.key not in results], loss)
        if not new:
            return runs, results
        results |= new
    raise AssertionError("the plan never ends")


def test_at_first_there_are_searches_only() -> None:
    runs = plan({})
    alone = [r for r in runs if r.experiment == "robustness"]
    assert {r.experiment for r in runs} == {*suite.SEARCHES, "robustness"}
    assert len(runs) - len(alone) == suite.FIRST * sum(map(len, suite.SEARCHES.values()))
    assert len({r.key for r in runs}) == len(runs)


def test_the_best_rate_is_inside_and_has_all_seeds() -> None:
    """Where the best lies at an end another rate is tried, as often as it takes, up to a limit."""
    runs, results = everything(lambda r: abs(r.lr - 0.2) if r.label == "Adan" else r.lr)
    assert rates("Adan", runs)[-1] == 0.5 and best_rate("Adan", results) == 0.2
    assert sorted({r.seed for r in runs if r.label == "Adan" and r.lr == 0.2}) == list(suite.SEEDS)
    # The lower, the better without end.
    assert len(rates("Lion", runs)) == suite.MOST and best_rate("Lion", results) == min(
        rates("Lion", runs)
    )


def test_what_depends_on_results_takes_the_best_rates() -> None:
    runs, _ = everything(lambda r: abs(r.lr - 0.006))
    assert {r.experiment for r in runs} == set(suite.EXPERIMENTS)
    large = {(r.label, r.lr) for r in runs if r.experiment == "large rates"}
    assert large == {(label, lr) for label in suite.LARGE["of"] for lr in (0.02, 0.06)}
    bursts = [r for r in runs if r.experiment == "burst"]
    assert {r.tags["burst"] for r in bursts} == {1.0, suite.BURST}
    assert len(bursts) == 2 * len(suite.BURSTS)
    assert len([r for r in runs if r.experiment == "grid"]) == len(suite.GRID)
    assert len({r.key for r in runs}) == len(runs)


def test_each_disturbance_has_an_undisturbed_run_of_its_seed() -> None:
    own = plan({}, ["robustness"])
    assert {r.experiment for r in own} == {"robustness"}
    for label in suite.ROBUST:
        of = [r for r in own if r.label == label]
        assert len({(r.flags, r.lr) for r in of}) == 1
        found = {(r.seed, *r.tags.values()) for r in of}
        assert found == {(s, *tags.values()) for s in suite.SEEDS for tags in suite.DISTURBED}
    assert suite.DISTURBED[0] == {"burst": 1.0, "corrupted": 0.0}


def test_what_diverges_is_no_best() -> None:
    runs, results = everything(lambda r: float("nan") if r.lr > 0.01 else -r.lr)
    assert best_rate("S3", results) == 0.006
    assert {r.experiment for r in runs} == set(suite.EXPERIMENTS)


def test_only_some_and_what_they_need() -> None:
    assert {r.experiment for r in plan({}, ["ablations"])} == {"ablations"}
    needed = plan({}, ["burst"])
    assert {r.experiment for r in needed} == {"optimizers"}
    assert {r.label for r in needed} == {"S3", "AdamW", "NAdam"}
    assert {r.label for r in plan({}, ["grid"])} == {"S3"}


def test_the_numbers_of_runs_that_wait() -> None:
    runs, results = everything(lambda r: abs(r.lr - 0.006))
    assert suite.waiting(results) == []
    for experiment, (of, count) in suite.NEEDS.items():
        assert len([r for r in runs if r.experiment == experiment]) == count
        (line,) = suite.waiting({}, [experiment])
        assert line == (
            f"{experiment}: up to {count} runs, planned when the best learning rate of "
            f"{', '.join(of)} is known"
        )
    (line,) = suite.waiting({}, ["burst"], ["S3"])
    assert line.endswith("(--of leaves out AdamW, NAdam)")
    (line,) = suite.waiting({}, ["recipes"])
    assert line.startswith("recipes: more learning rates and 2 more seeds of each of 7 rows")


def test_only_some_labels() -> None:
    """And of what depends on a result that which can be known."""
    of = ["S3", "NAdam, warmup 30 %"]
    runs = plan({}, labels=of)
    assert {(r.experiment, r.label) for r in runs} == {
        ("optimizers", of[0]), ("recipes", of[1]), ("robustness", of[0]),
    }  # fmt: skip
    results = finished(runs, lambda r: abs(r.lr - 0.006))
    later = {(r.experiment, r.label) for r in plan(results, ["burst", "large rates"], of)}
    assert later == {
        ("optimizers", "S3"), ("large rates", "S3"),
        *(("burst", label) for label, (_, best) in suite.BURSTS.items() if best == "S3"),
    }  # fmt: skip


def test_decay_follows_the_rate() -> None:
    for run in plan({}):
        words = run.words
        lr, decay = (float(words[words.index(f) + 1]) for f in ("--lr", "--weight-decay"))
        assert lr * decay == pytest.approx(suite.DECAY, rel=1e-5)


def test_results_of_finished_runs_alone(tmp_path) -> None:
    for name, text in {"a": '{"valid_loss": 2.5}', "b": '{"valid_lo', "c": "{}"}.items():
        (tmp_path / "optimizers" / name).mkdir(parents=True)
        (tmp_path / "optimizers" / name / "run.json").write_text(text)
    assert runner.results(tmp_path) == {"optimizers/a": 2.5}


def test_the_toy_without_noise() -> None:
    """S3 goes to the minimum as far as float64 does; the gradient's sign oscillates around it."""
    for label, low, high in (("S3", 0, 1e-25), ("SignSGD", 1e-4, 1)):
        run = toy.train(label, 0.01, 0.0, 1)
        assert run["x"][0] == list(toy.START) and len(run["x"]) == len(run["loss"]) == toy.STEPS + 1
        assert low <= toy.end(run["loss"]) <= high, label
        assert max(run["update"]) <= 1 + 1e-12
    assert toy.end(toy.train("SGD", 1.0, 0.0, 1)["loss"]) == float("inf")


def test_the_gradient_is_the_losses() -> None:
    x = torch.tensor([1.5, 0.7], dtype=torch.float64, requires_grad=True)
    toy.loss(x[0], x[1]).backward()
    assert x.grad.tolist() == pytest.approx(toy.gradient(1.5, 0.7), rel=1e-14)


def test_a_launch_has_no_bursts(tmp_path, capsys) -> None:
    words = ["--config", "tiny-s3", "--out", str(tmp_path), "--dry-run"]
    assert runner.main(["--only", "burst", *words]) == 2
    assert "error: burst needs the small suite's trainer" in capsys.readouterr().err
    assert runner.main(["--only", "burst", "toy", *words]) == 0
    shown = capsys.readouterr().out
    assert "left out: burst needs" in shown and "toy: Figure 1's problem" in shown


@pytest.mark.parametrize(
    "words",
    [
        ["--iters", "5"],
        ["--jobs", "0"],
        ["--slurm"],
        ["--of", "S4"],
        ["--lengths", "0"],
        ["--sizes", "7B"],
    ],
)
def test_bad_arguments_are_refused(words: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        runner.main(words)
    assert words[0] in capsys.readouterr().err


def test_runs_that_cannot_be_compared_are_kept_apart(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(runner.data, "build", lambda *a, **k: None)
    monkeypatch.setattr(runner.data, "megatron_arguments", lambda prefix: [])
    words = ["--only", "burst", "--out", str(tmp_path), "--dry-run"]
    assert runner.main([*words, "--", "--hidden-size", "128"]) == 0
    shown = capsys.readouterr().out
    assert "--hidden-size 64" in shown
    *runs, count, waiting = shown.splitlines()
    assert all(line.endswith("--hidden-size 128") for line in runs)
    assert count == f"{len(runs)} runs are known" and waiting.startswith("burst: up to 12 runs")
    assert runner.main(words) == 0  # a dry run has made no runs, and claims the folder for none
    monkeypatch.setattr(runner, "_suite", lambda args, chosen: 0)
    assert runner.main([*words[:-1], "--", "--hidden-size", "128"]) == 0
    with pytest.raises(SystemExit, match="another --out"):
        runner.main(words)
    (tmp_path / "suite.json").write_text('{"iters": 6')
    with pytest.raises(SystemExit, match=r"suite\.json is damaged .* another --out"):
        runner.main(words)


def test_jobs_are_submitted_once_and_recorded_when_they_end(tmp_path, monkeypatch, capsys) -> None:
    """No SLURM here: what the launcher would write is written by hand."""
    submitted: list[list[str]] = []

    def submit(command: list[str], check: bool) -> None:
        folder = Path(command[command.index("--run-dir") + 1])
        folder.mkdir(parents=True)
        (folder / "submitted.txt").touch()
        submitted.append(command)

    monkeypatch.setattr(runner.subprocess, "run", submit)
    words = ["--only", "recipes", "--out", str(tmp_path), "--config", "tiny-s3", "--slurm"]
    assert runner.main(words) == 0 and runner.main(words) == 0
    assert len(submitted) == suite.FIRST * len(suite.SEARCHES["recipes"])
    long = next(c for c in submitted if "lr_warmup_fraction=0.3" in c)
    assert "lr_warmup_iters=0" in long and "plugin_log_updates=true" in long and "--slurm" in long
    for command in submitted:
        folder = Path(command[command.index("--run-dir") + 1]) / "tensorboard"
        folder.mkdir()
        lines = [{"kind": "start", "iteration": 0, "train_iters": 30},
                 {"kind": "valid", "iteration": 30, "loss": 2.0}]  # fmt: skip
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert runner.main(words) == 0  # all rates are equal: the lowest is at an end, another is tried
    assert len(runner.results(tmp_path)) == suite.FIRST * len(suite.SEARCHES["recipes"])
    assert len(submitted) == (suite.FIRST + 1) * len(suite.SEARCHES["recipes"])


def run_apart(words: list[str], runs: list[Run], said: Path) -> None:
    """Runs these, in a process of its own: it is one for the CPU afterwards."""

    def child() -> None:
        runner.plan = lambda results, only, of: runs
        with said.open("w") as file, contextlib.redirect_stdout(file):
            status = runner.main(words)
        sys.exit(status)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.thorough
@pytest.mark.slow
def test_runs_are_trained_once_and_a_burst_is_one(tmp_path) -> None:
    """A gradient 1000 times too large changes nothing before it, exactly, and the run after it."""
    flags, lr = "--optimizer s3", 6e-3
    pair = [Run("burst", "S3", flags, lr, tags={"burst": burst}) for burst in (1.0, 1000.0)]
    words = ["--only", "burst", "--out", str(tmp_path), "--iters", "20", "--jobs", "2"]
    run_apart(words, pair, tmp_path / "said")
    first, second = (
        [
            (r["iteration"], r["loss"])
            for r in runner.read(tmp_path / run.key)
            if r["kind"] == "train"
        ]
        for run in pair
    )
    before = [pair for pair in first if pair[0] < 10]  # of iteration 10 the loss is known before
    assert before == [pair for pair in second if pair[0] < 10] and len(before) > 8
    assert first[-1] != second[-1]
    record = json.loads((tmp_path / pair[1].key / "run.json").read_text())
    assert record["label"] == "S3" and record["tags"] == {"burst": 1000.0}
    assert (tmp_path / "report/report.html").exists()
    assert "one gradient 1000 times too large" in (tmp_path / "said").read_text()
    before = (tmp_path / pair[1].key / "run.json").stat().st_mtime_ns
    run_apart(words, pair, tmp_path / "again")
    assert (tmp_path / pair[1].key / "run.json").stat().st_mtime_ns == before
