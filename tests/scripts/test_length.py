"""Long runs: all optimizers are planned alike, and no text is both chosen by and reported."""

import argparse
import json
import re
import sys

import numpy as np
import pytest

from megatron_s3 import data
from megatron_s3.data import indexed
from scripts.experiments import halves, length, runner
from scripts.experiments.suite import FIRST, SEEDS, Run
from tests.harness.trainer import REPOSITORY

SMALL = [length.SIZES["0.12M"]]
#: The rows that need no other package.
ROWS = {k: v for k, v in length.OPTIMIZERS.items() if k not in length.NEEDED}


def everything(loss, sizes=SMALL, lengths=length.LENGTHS) -> list[Run]:
    results: dict[str, float] = {}
    for _ in range(20):
        runs = length.plan(results, sizes, lengths)
        new = {run.key: loss(run) for run in runs if run.key not in results}
        if not new:
            assert len({run.key for run in runs}) == len(runs)
            return runs
        results |= new
    raise AssertionError("the plan never ends")


def plain(run: Run) -> list[str]:
    """Returns a run's flags without those of its optimizer, its rate and its decay."""
    words = run.words
    for flag in ("--lr", "--min-lr", "--weight-decay"):
        at = words.index(flag)
        del words[at : at + 2]
    own = length.OPTIMIZERS[run.label][0].split()
    at = next(k for k in range(len(words)) if words[k : k + len(own)] == own)
    return words[:at] + words[at + len(own) :]


def test_optimizers_differ_in_their_own_flags_alone() -> None:
    runs = everything(lambda run: abs(np.log(run.lr / 0.006)), list(length.SIZES.values()))
    for size in length.SIZES.values():
        for tokens in length.LENGTHS:
            of = [r for r in runs if r.experiment == f"{size.name} parameters x {tokens} tokens"]
            assert {r.label for r in of} == set(ROWS)
            for seed in SEEDS:
                assert len({tuple(plain(r)) for r in of if r.seed == seed}) == 1


def test_a_longer_search_begins_with_the_seeds_of_the_rate_before() -> None:
    """Its own best rate is then searched on both sides, and has all seeds at the end."""
    factors = {20: 1, 100: 3}
    middles = {label: middle for label, (_, middle) in ROWS.items()}
    runs = everything(
        lambda run: abs(np.log(run.lr * factors[round(run.tags["tokens"])] / middles[run.label]))
    )
    for label, middle in middles.items():
        for tokens, factor in factors.items():
            rate = float(f"{middle / factor:.1g}")
            own = [r for r in runs if r.label == label and r.tags["tokens"] == tokens]
            assert sorted(r.seed for r in own if r.lr == rate) == sorted(SEEDS)
            assert {r.lr for r in own if r.seed == SEEDS[0]} > {rate}
        first = [r for r in runs if r.label == label and r.tags["tokens"] == 20][:FIRST]
        assert first[FIRST // 2].lr == middle
    longer = [r for r in runs if r.tags["tokens"] == 100]
    many = len(ROWS)
    for k, seed in enumerate(SEEDS):  # a part of the runs holds every optimizer
        part = longer[k * many : (k + 1) * many]
        assert [r.label for r in part] == list(ROWS)
        assert all((r.seed, r.lr) == (seed, middles[r.label]) for r in part)


def test_only_some_optimizers_and_lengths() -> None:
    runs = length.plan({}, SMALL, [100], ["S3", "AdamW"])
    assert {(r.label, r.tags["tokens"]) for r in runs} == {("S3", 100), ("AdamW", 100)}
    assert len(runs) == 2 * FIRST


def test_rows_that_need_another_package_are_planned_where_they_are_named(monkeypatch, capsys):
    assert {run.label for run in length.plan({}, SMALL, [20])} == set(ROWS)
    muon = list(length.NEEDED)
    runs = length.plan({}, SMALL, [20], [*muon, "AdamW"])
    assert {run.label for run in runs} == {*muon, "AdamW"}
    (line,) = length.cost(SMALL, [20], muon)
    assert f": {len(muon) * (FIRST + len(SEEDS) - 1)} to " in line
    assert length.missing(None) is None and length.missing(["S3"]) is None
    monkeypatch.setattr(length.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        runner.main(["--only", "length", "--of", "AdamW", *muon, "--dry-run"])
    assert (
        "error: --of Muon 'Muon, S3' SOAP: install what it trains with: "
        f"{sys.executable} -m pip install --no-deps emerging-optimizers==0.3.0"
    ) in capsys.readouterr().err


def test_the_cost_is_said_beforehand() -> None:
    for loss in (lambda run: abs(np.log(run.lr / 0.006)), lambda run: run.lr):
        runs = everything(loss)
        for tokens, line in zip(length.LENGTHS, length.cost(SMALL), strict=True):
            few, _, many = line.split(": ")[1].split()[:3]
            count = len([r for r in runs if r.tags["tokens"] == tokens])
            assert int(few) <= count <= int(many)
            iters = SMALL[0].iterations(tokens)
            assert f"{iters:,} iterations" in line and "hours each" in line
            assert abs(iters * SMALL[0].batch - tokens * SMALL[0].parameters) <= SMALL[0].batch / 2


def test_the_cost_is_what_the_page_says() -> None:
    page = (REPOSITORY / "scripts/README.md").read_text(encoding="utf-8")
    sizes = [length.SIZES[name] for name in ("0.12M", "0.8M", "3M")]
    for line in length.cost(sizes):
        size, tokens, runs, iters, each, hours = re.fullmatch(
            r"(\S+) parameters x (\d+) tokens: (\d+ to \d+) runs of ([\d,]+) iterations with \S+ "
            r"tokens, (\S+) hours each on one core, (.+) in all",
            line,
        ).groups()
        assert f"| {size} | {tokens} | {iters} | {each} | {runs} | {hours} |" in page


def test_only_long_runs_save_checkpoints() -> None:
    for size in length.SIZES.values():
        for tokens in length.LENGTHS:
            runs = length.plan({}, [size], [tokens])
            assert {"--save-interval" in run.words for run in runs} == {size.name != "0.12M"}


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for k in range(100):
        (folder / f"{k:02}.txt").write_text(f"document {k} " * 20)
    data.build(data.source(str(folder)), str(tmp_path / "text"), tokenizer="bytes")
    return str(tmp_path / "text")


def test_halves_share_no_document_and_leave_none_out(text) -> None:
    halves.write(text)
    library = indexed.library()
    documents = {
        name: [bytes(d.astype(np.uint8)) for d in library.IndexedDataset(f"{text}_{name}")]
        for name in ("train", "valid", *halves.HALVES)
    }
    of = {name: set(found) for name, found in documents.items()}
    assert all(len(of[name]) == len(documents[name]) for name in of)
    assert of["choice"] | of["test"] == of["valid"] and not of["choice"] & of["test"]
    assert not of["train"] & of["valid"]
    words = halves.arguments(text)
    paths = {word: words[words.index(word) + 1] for word in words if word.endswith("-data-path")}
    assert paths == {
        "--train-data-path": f"{text}_train",
        "--valid-data-path": f"{text}_choice",
        "--test-data-path": f"{text}_test",
    }


def test_the_last_flags_of_a_run_are_its_own(text, tmp_path) -> None:
    """Megatron takes the last of two equal flags."""
    args = argparse.Namespace(out=tmp_path, iters=600, megatron=[])
    words = runner._words(length.plan({}, [length.SIZES["0.8M"]], [20])[0], args)
    last = {word: words[k + 1] for k, word in enumerate(words[:-1]) if word.startswith("--")}
    assert last["--train-iters"] == "16335" and last["--hidden-size"] == "128"
    assert last["--valid-data-path"] == f"{text}_choice"
    assert last["--save"] == last["--load"]


def test_the_loss_of_the_test_text_is_recorded(tmp_path) -> None:
    run = length.plan({}, SMALL)[0]
    folder = tmp_path / run.key
    folder.mkdir(parents=True)
    lines = [{"kind": "start", "iteration": 0, "train_iters": 30},
             {"kind": "valid", "iteration": 30, "loss": 2.0},
             {"kind": "test", "iteration": 30, "loss": 2.5}]  # fmt: skip
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert runner._finish(run, argparse.Namespace(out=tmp_path, config=None))
    record = json.loads((folder / "run.json").read_text())
    assert (record["valid_loss"], record["test_loss"]) == (2.0, 2.5)
    assert runner.results(tmp_path) == {run.key: 2.0}
