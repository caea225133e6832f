"""The table of features: what its cells say, and one of them."""

from pathlib import Path

import pytest

from tests.harness.forks import TIMED_OUT, TRAINER
from tests.harness.trainer import TINY, Run, forks
from tests.matrix import features, results, verdicts

TRAINED = {"outcome": "bitwise", "wrong": []}
DIFFERS = {"outcome": "differs", "wrong": [], "values": 9, "differ": ["a", "b"]}


def failed(error: str, refused: bool = False) -> dict:
    return {"outcome": "failed", "wrong": [], "error": error, "refused": refused}


@pytest.mark.parametrize(
    ("s3", "adam", "verdict", "note"),
    [
        (TRAINED, None, "bitwise", ""),
        (TRAINED | {"wrong": ["other losses"]}, TRAINED, "defect", "other losses"),
        (failed("E: no TE"), failed("E: no TE"), "not here", "E: no TE (Adam: the same)"),
        (failed("E: one"), failed("E: two"), "not here", "E: one (Adam: E: two)"),
        (failed("E: one"), TRAINED, "defect", "E: one (Adam: bitwise)"),
        (failed("ValueError: no", True), TRAINED, "refused", "ValueError: no (Adam: bitwise)"),
        (failed("x: error: unrecognized arguments: --new"), None, "absent", ""),
        (DIFFERS, TRAINED, "defect", "2 of 9 values differ: a, b (Adam: bitwise)"),
        (DIFFERS, DIFFERS, "trained", "2 of 9 values differ: a, b (Adam: the same)"),
        (DIFFERS | {"same losses": True}, DIFFERS, "losses", None),
        (failed("E: x") | {"outcome": "not resumed"}, TRAINED, "defect", None),
    ],
)
def test_a_cell_is_a_defect_where_adam_does_more(s3, adam, verdict, note) -> None:
    assert verdicts.verdict(s3, adam) == verdict
    assert note is None or verdicts.note(s3, adam) == note


@pytest.mark.parametrize(
    ("log", "status", "error", "refused"),
    [
        ('  File "/x/megatron_s3/mcore/a.py", line 1, in f\n    raise\nValueError: --no', 1,
         "ValueError: --no", True),
        ('  File "/x/megatron/core/a.py", line 1, in f\n    raise\n[rank1]: ValueError: --no', 1,
         "ValueError: --no", False),
        ('  File "/x/a.py", line 1, in f\n    assert x == 1\n           ^^^\nAssertionError', 1,
         "AssertionError: assert x == 1", False),
        ("usage: ...\ntrain: error: unrecognized arguments: --new", 2,
         "train: error: unrecognized arguments: --new", False),
        ("one\nthe end\n", -11, "exit status -11: the end", False),
        ("", TIMED_OUT, f"not finished after {verdicts.LIMIT} s", False),
    ],
)  # fmt: skip
def test_the_first_error_of_a_log(log: str, status: int, error: str, refused: bool) -> None:
    assert verdicts.failure(Run(status, log)) == {"error": error, "refused": refused}


def test_the_table_merges_equal_neighbours_and_numbers_notes() -> None:
    cells = {row.name: {"verdict": "bitwise", "note": ""} for row in features.ROWS}
    cells["torch FSDP2, torch_dist"] = {"verdict": "refused", "note": "why"}
    data = {"releases": {"main": {}, "1.0": {}}, "cells": {"1.0": cells, "main": cells}}
    full, merged = (results.markdown(data, merged=m).splitlines() for m in (False, True))
    assert sum(line.endswith("| 2 | bitwise | bitwise |") for line in full) > 30
    assert sum(line.endswith("| 2 | bitwise | bitwise |") for line in merged) < 15
    for lines in (full, merged):
        assert lines[0] == "| feature | ranks | 1.0 | main |"
        assert "| torch FSDP2, torch_dist | 2 | refused [1] | refused [1] |" in lines
        assert "1. why" in lines


@pytest.mark.slow
def test_context_parallel_ranks_go_on_with_the_same_model(tmp_path: Path) -> None:
    """Within 1e-5: what one rank has saved, on parts of its sequences that attention gathers.

    Another start would not do: Megatron draws position embeddings from another state there.
    """
    argv = [*TINY, "--train-iters", "6", "--optimizer", "s3", "--use-distributed-optimizer"]
    argv += ["--dist-ckpt-optim-fully-reshardable", "--attention-dropout", "0"]
    argv += ["--hidden-dropout", "0", "--save-interval", "3"]
    attention = ["attention", TRAINER]
    runs = []
    for ranks, program, words in (
        (1, None, [*argv, "--save", str(tmp_path)]),
        (2, "tests.matrix.changes",
         [*attention, *argv, "--context-parallel-size", "2", "--load", str(tmp_path)]),
    ):  # fmt: skip
        log = tmp_path / f"{ranks}.log"
        assert forks().run(words, ranks, log, program) == 0, log.read_text()[-4000:]
        runs.append(Run(0, log.read_text()))
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    assert "sharded over 2" in runs[1].log
    one, two = ({i: float(run.losses[i]) for i in (4, 6)} for run in runs)
    assert two == pytest.approx(one, abs=1e-5)
