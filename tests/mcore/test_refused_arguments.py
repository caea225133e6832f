"""The trainer refuses arguments in one line and with status 2, on every rank alike."""

import pytest

from megatron_s3.mcore import refusal
from megatron_s3.mcore.refusal import AllRanksError, Refused, in_one_line
from tests.harness.trainer import train


@pytest.mark.parametrize(
    ("error", "status", "speaker"),
    [(Refused("--a 1 is not b"), 2, "0"), (AllRanksError("/a is damaged", 2), 1, "2")],
)
def test_one_line_of_the_rank_that_speaks(monkeypatch, capsys, error, status, speaker):
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        assert capsys.readouterr().err == ""

    monkeypatch.setattr(refusal.time, "sleep", sleep)
    for rank in ("0", "2", "3"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended, in_one_line():
            raise error
        assert ended.value.code == status
        # Whoever ends first has the others killed: the speaker comes to say why. Who was not
        # killed says it: the speaker's node has no such error.
        assert waited == ([] if rank == speaker else [60.0])
        assert capsys.readouterr().err == f"error: {error}\n"
        waited.clear()


def test_other_errors_are_no_refusals():
    with pytest.raises(ValueError, match="bad"), in_one_line():
        raise ValueError("bad")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--optimizer s3 --s3-grad-bound 0.5", "error: --s3-grad-bound must be in [1, inf), not"),
        ("--optimizer s3 --clip-grad nan", "error: --clip-grad must be at least 0, not nan"),
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
