"""The trainer refuses arguments in one line and with status 2, on every rank alike."""

import pytest

from megatron_s3.mcore import refusal
from megatron_s3.mcore.refusal import AllRanksError, Refused, in_one_line
from tests.harness.trainer import train


def test_one_line_of_rank_0(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(refusal.time, "sleep", waited.append)
    for rank, patience in (("0", []), ("1", [60.0])):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended, in_one_line():
            raise Refused("--a 1 is not b")
        assert ended.value.code == 2
        # Whoever ends first has the others killed: rank 0 comes to say why.
        assert waited == patience
    assert capsys.readouterr().err == "error: --a 1 is not b\n"


def test_one_line_of_the_rank_that_speaks_for_a_group(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(refusal.time, "sleep", waited.append)
    for rank in ("0", "2", "3"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended, in_one_line():
            raise AllRanksError("/a is damaged", 2)
        assert ended.value.code == 1
    assert waited == [60.0] * 2
    assert capsys.readouterr().err == "error: /a is damaged\n"


def test_other_errors_are_no_refusals():
    with pytest.raises(ValueError, match="bad"), in_one_line():
        raise ValueError("bad")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--optimizer s3 --s3-grad-bound 0.5", "error: --s3-grad-bound must be in [1, inf), not"),
        ("--optimizer adam --s3-beta .9", "error: --s3-beta is a flag of --optimizer s3, but"),
        (
            "--optimizer s3 --use-precision-aware-optimizer",
            "error: --use-precision-aware-optimizer needs --use-distributed-optimizer",
        ),
        ("--optimizer s3 --spec a b", "error: megatron_s3.pretrain_gpt does not support spec"),
    ],
)
def test_the_trainer(flags, message):
    run = train(*flags.split(), ranks=2, check=False)
    assert run.returncode == 2
    assert run.error.startswith(message), run.log[-3000:]
    assert "Traceback" not in run.log
