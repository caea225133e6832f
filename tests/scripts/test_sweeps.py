"""Sweeps of a setting: each differs from the usual runs in what it names, and in nothing else."""

import pytest

from megatron_s3.launch import lock
from megatron_s3.report.settings import USUAL
from scripts.experiments import length, runner, sweeps
from scripts.experiments.suite import FIRST, SEEDS, Run

RATES = ("--lr", "--min-lr", "--weight-decay")
#: By sweep: the flags in which its runs may differ from the usual ones.
OWN = {
    "batch size": {
        "--micro-batch-size", "--global-batch-size", "--train-iters", "--eval-interval",
        "--log-interval", "--eval-micro-batch-size", "--eval-global-batch-size",
    },
    "beta": {"--s3-beta", "--adamw-beta2"},
    "schedule": {"--lr-decay-style", "--lr-wsd-decay-style", "--lr-wsd-decay-iters"},
    "lr x weight decay": set(),
    "layers": {"--num-layers"},
}  # fmt: skip


def flags(run: Run) -> dict[str, str]:
    """Returns the flags as Megatron takes them: the last of equal ones."""
    words = [*runner.SMALL, *run.words]
    last = {}
    for word, value in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--"):
            last[word] = "" if value.startswith("--") else value
    return last


def everything(values=None) -> list[Run]:
    results: dict[str, float] = {}
    for _ in range(20):
        runs = sweeps.plan(results, list(sweeps.SWEEPS), None, values)
        new = {run.key: abs(run.lr - 0.006) for run in runs if run.key not in results}
        if not new:
            assert len({run.key for run in runs}) == len(runs)
            return runs
        results |= new
    raise AssertionError("the plan never ends")


def test_a_sweep_changes_what_it_names_alone() -> None:
    assert set(OWN) == set(sweeps.SWEEPS) == set(USUAL)
    runs = everything()
    usual = {run.label: flags(run) for run in runs if run.tags.get("tokens") == sweeps.TOKENS}
    assert set(usual) == set(sweeps.OF)
    for name, values in sweeps.SWEEPS.items():
        for value in values:
            of = [run for run in runs if (run.experiment, run.tags.get("setting")) == (name, value)]
            assert {run.label for run in of} == set(sweeps.OF)
            for run in of:
                own, before = flags(run), usual[run.label]
                differ = {f for f in {*own, *before} if own.get(f) != before.get(f)}
                assert differ - {*RATES, "--seed"} <= OWN[name], (name, value)


def test_settings_are_what_they_are_called() -> None:
    runs = everything()
    usual = length.SIZES["0.12M"].iterations(sweeps.TOKENS)
    for run in (run for run in runs if "setting" in run.tags):
        own, value = flags(run), str(run.tags["setting"])
        lr, floor, decay = (float(own[flag]) for flag in RATES)
        tokens = int(own["--train-iters"]) * int(own["--global-batch-size"])
        assert tokens == pytest.approx(usual * 16, rel=0.005)
        per_token = lr * decay / int(own["--global-batch-size"])
        if run.experiment == "lr x weight decay":
            assert lr * decay == pytest.approx(float(value), rel=1e-5)
        else:
            assert per_token == pytest.approx(3e-5 / 16, rel=1e-5)
        assert floor == pytest.approx(0 if run.experiment == "schedule" else lr / 10)
        if run.experiment == "batch size":
            assert own["--global-batch-size"] == own["--micro-batch-size"] == value
            assert own["--eval-global-batch-size"] == "16"  # as many samples of the same text
        if run.experiment == "beta":
            assert own["--s3-beta" if "S3" in run.label else "--adamw-beta2"] == value
        if run.experiment == "layers":
            assert own["--num-layers"] == value
        if value.startswith("constant"):
            assert own["--lr-decay-style"] == "WSD"
            assert int(own["--lr-wsd-decay-iters"]) == round(usual / 5)


def test_every_optimizer_is_searched_at_every_setting_and_seeds_come_last() -> None:
    runs = everything()
    swept = [run for run in runs if "setting" in run.tags]
    first = [run.seed == SEEDS[0] for run in swept]
    assert first == sorted(first, reverse=True)
    for run in swept:
        alike = [r for r in swept if (r.experiment, r.tags, r.label) ==
                 (run.experiment, run.tags, run.label)]  # fmt: skip
        assert len({r.lr for r in alike if r.seed == SEEDS[0]}) >= FIRST
        assert {r.seed for r in alike} == set(SEEDS)


def test_only_some_settings() -> None:
    runs = everything(["64", "cosine to 0"])
    assert {str(run.tags["setting"]) for run in runs if "setting" in run.tags} == {
        "64",
        "cosine to 0",
    }
    lines = sweeps.cost(list(sweeps.SWEEPS), values=["64", "cosine to 0"])
    assert [line.split(":")[0] for line in lines] == ["batch size 64", "schedule cosine to 0"]
    few, _, many = lines[0].split(": ")[1].split()[:3]
    count = len([run for run in runs if run.experiment == "batch size"])
    assert int(few) <= count <= int(many)


def test_a_launch_has_no_sweeps(tmp_path, capsys) -> None:
    words = ["--config", "tiny-s3", "--out", str(tmp_path), "--dry-run", "--only"]
    assert runner.main([*words, "batch size"]) == 2
    assert "error: batch size needs the small suite's model" in capsys.readouterr().err


WHICH = "name a part that has it: --only"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--only beta --settings 64", f"--settings 64: {WHICH} 'batch size'"),
        ("--only optimizers --settings 64", f"--settings 64: {WHICH} 'batch size'"),
        ("--only schedule layers --settings 64", f"--settings 64: {WHICH} 'batch size'"),
        ("--only length --of Tiger", "argument --of: invalid choice: 'Tiger'"),
        ("--only recipes --of AdamW Lion", f"--of AdamW: {WHICH} optimizers length"),
        ("--only grid --of NAdam", f"--of NAdam: {WHICH} optimizers length"),
        ("--only robustness --of Adan", f"--of Adan: {WHICH} optimizers length 'batch size'"),
        ("--only toy --of S3", f"--of S3: {WHICH} optimizers"),
        ("--sizes 0.8M", "--sizes has no effect without --only length"),
        ("--only beta --lengths 20", "--lengths has no effect without --only length"),
        ("--only length beta --iters 50", "--iters has no effect on length, beta, which have"),
        ("--config tiny-s3 --jobs 2", "--jobs is for the small suite: leave out --config"),
        ("--config tiny-s3 --only length --sizes 3M", "--sizes is for the small suite: leave out"),
    ],
)
def test_what_has_no_effect_is_refused(words: str, expected: str, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        runner.main(["--out", str(tmp_path), "--dry-run", *words.split()])
    assert expected in capsys.readouterr().err


def test_known_runs_are_not_of_a_configuration(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        runner.main(["--config", "tiny-s3", "--out", str(tmp_path), "--known", "report.json"])
    assert "--known is for the small suite" in capsys.readouterr().err


def test_nothing_is_written_into_a_folder_in_which_another_process_trains(tmp_path, capsys) -> None:
    with lock.hold([tmp_path]):
        words = ["--only", "optimizers", "--out", str(tmp_path), "--dry-run"]
        assert runner.main([*words, "--known", str(tmp_path / "report.json")]) == 2
    assert "is in use by another launch" in capsys.readouterr().err
