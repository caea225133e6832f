"""``megatron-s3 VERB``: what it says before a verb's module is there."""

import importlib
import io
import sys
import types

import pytest

from megatron_s3 import cli


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_missing_package_is_one_line(verb: str, monkeypatch, capsys) -> None:
    def missing(argv: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'megatron.core'", name="megatron.core")

    monkeypatch.setattr(importlib, "import_module", lambda _: types.SimpleNamespace(main=missing))
    assert cli.main([verb, "x"]) == 2
    *said, error = capsys.readouterr().err.splitlines()
    assert error == (
        f"error: megatron-s3 {verb} needs megatron, which is not installed here (No module named "
        "'megatron.core'): pip install 'megatron-s3[megatron]'"
    )
    assert said == (["[megatron_s3] loading PyTorch"] if verb in ("convert", "export") else [])


def test_a_module_of_ones_own_that_is_missing_stays_a_fault(monkeypatch) -> None:
    def broken(argv: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'megatron_s3.x'", name="megatron_s3.x")

    monkeypatch.setattr(importlib, "import_module", lambda _: types.SimpleNamespace(main=broken))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["data"])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_name_that_the_output_cannot_spell_ends_no_work(encoding: str, monkeypatch) -> None:
    def told(argv: list[str]) -> int:
        print(*argv)
        return 0

    monkeypatch.setattr(importlib, "import_module", lambda _: types.SimpleNamespace(main=told))
    with io.TextIOWrapper(io.BytesIO(), encoding=encoding) as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert cli.main(["report", "runs/é-北"]) == 0
        output.flush()
        written = output.buffer.getvalue()
    spelled = {"ascii": r"\xe9-\u5317", "latin-1": r"é-\u5317", "utf-8": "é-北"}[encoding]
    assert written.decode(encoding) == f"runs/{spelled}\n"
