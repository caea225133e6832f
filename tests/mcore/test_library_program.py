"""The program in megatron_s3/mcore/README.md, as it stands there, and wrong checkpoints for it."""

import re
import tempfile
from pathlib import Path

import pytest
import torch

from megatron_s3.checkpoints import convert
from megatron_s3.checkpoints.errors import ConvertError
from megatron_s3.rules.roots import square_root
from megatron_s3.telemetry import runlog
from tests.harness.trainer import assert_bitwise_equal, forks, tensors

PAGE = Path(__file__).parents[2] / "megatron_s3/mcore/README.md"
RANKS = 2


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S)
    (text,) = [block for block in blocks if "sys.argv" in block]
    path = tmp_path_factory.mktemp("program") / "train.py"
    path.write_text(text)
    return path


def run(program: Path, *argv: str | Path, ranks: int = RANKS, fails: bool = False) -> str:
    with tempfile.NamedTemporaryFile("r", errors="replace") as log:
        words = [str(word) for word in argv]
        status = forks().run(words, ranks, log.name, program=str(program))
        said = log.read()
    assert (status != 0) is fails, said[-4000:]
    return said


@pytest.fixture(scope="module")
def first(program, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("first") / "first"
    said = run(program, "4", folder)
    assert len(re.findall(r"^step \d: loss 4\.\d+, gradient norm \d\.\d+$", said, re.M)) == 4
    assert "optimizer='s3'" in said or "optimizer='" not in said  # Megatron's log of its settings
    return folder


def test_it_resumes_bitwise_and_reshards(program, first, tmp_path):
    run(program, "8", tmp_path / "through")
    assert "checksums verified" in run(program, "8", tmp_path / "resumed", first)
    saved = tensors(tmp_path / "through", None)
    assert any("exp_pnorm" in name for name in saved)
    assert_bitwise_equal(saved, tensors(tmp_path / "resumed", None))
    for ranks in (1, 3):
        again = tmp_path / f"of {ranks}"
        run(program, "4", again, first, ranks=ranks)  # saves what it has loaded
        assert_bitwise_equal(tensors(first, None), tensors(again, None))


def test_it_logs_losses_updates_and_rates_and_a_resumed_program_goes_on(program, first, tmp_path):
    """With the lines of the page; a line is the same whether the program was resumed or not."""
    (lines,) = re.findall(r"^```python\n(from megatron_s3.*?)^```", PAGE.read_text(), re.M | re.S)
    before, _, each = lines.partition("...\n")
    text = program.read_text()
    found = {}
    for name in ("through", "resumed"):
        folder = tmp_path / f"log of {name}"
        start = before.replace('"log"', repr(str(folder)))
        written = text.replace("rank, ranks =", f"{start}\nrank, ranks =")
        written = written.replace("    if rank == 0:\n", f"    {each}    if rank == 0:\n")
        assert written.count("metrics") == 3
        path = program.with_name(f"logs {name}.py")
        path.write_text(written)
        said = run(path, "4", tmp_path / f"{name} 4")
        said += run(path, "8", tmp_path / name, *([tmp_path / f"{name} 4"] * (name == "resumed")))
        found[name] = runlog.read(folder)
        printed = re.findall(r"^step (\d): loss (\S+), gradient norm (\S+)$", said, re.M)
    head = [record for record in found["resumed"] if record["kind"] == "start"]
    assert [record["iteration"] for record in head] == [0, 4]
    assert head[0]["hyperparameters"]["p"] == 3.0 and head[0]["optimizer"] == "s3"
    records = [record for record in found["resumed"] if record["kind"] == "train"]
    assert [record["iteration"] for record in records] == [2, 4, 6, 8]
    assert [record["tokens"] for record in records] == [8 * 16 * i for i in (2, 4, 6, 8)]
    losses = [float(loss) for _, loss, _ in printed]
    for i, record in enumerate(records):
        assert record["loss"] == pytest.approx(sum(losses[2 * i : 2 * i + 2]) / 2, abs=1e-4)
        assert record["grad_norm"] == pytest.approx(float(printed[2 * i + 1][2]), abs=1e-4)
        assert 0 < record["updates"]["all"]["mean_abs"] <= record["updates"]["all"]["max_abs"] <= 1
        assert len(record["updates"]["layers"]) == 2 and record["lr"] == 6e-3
    weights = [t for n, t in tensors(first, None).items() if not n.startswith("optimizer")]
    assert records[0]["updates"]["all"]["numel"] == sum(tensor.numel() for tensor in weights)
    through = [record for record in found["through"] if record["kind"] == "train"][-4:]
    for one, other in zip(records, through, strict=True):
        for key in ("iteration", "loss", "grad_norm", "updates"):
            assert one[key] == other[key]


def optimized_by(program: Path, optimizer: str) -> Path:
    """Writes the program with other arguments of the optimizer."""
    text = program.read_text()
    written = text.replace('"s3", lr=6e-3, s3_p=3.0', f"{optimizer}, lr=6e-3")
    assert written != text
    path = program.with_name(f"{len(list(program.parent.iterdir()))}.py")
    path.write_text(written)
    return path


@pytest.mark.parametrize("sharded", [True, False])
def test_adamws_checkpoint_is_converted_resumed_and_converted_back(program, sharded, tmp_path):
    """In the folder that the program has chosen, without a tracker file and arguments of a run."""
    adam, s3 = (optimized_by(program, f'"{name}", weight_decay=0.03') for name in ("adam", "s3"))
    if not sharded:
        for path in (adam, s3):
            path.write_text(
                path.read_text().replace(
                    "distributed_optimizer=True", "distributed_optimizer=False"
                )
            )
    first, as_s3, back = (tmp_path / name for name in ("first", "s3", "back"))
    run(adam, "4", first)
    record = convert.convert(first, as_s3, "s3")
    assert (record["iteration"], record["step"]) == (None, 4)
    assert record["flags"].startswith("OptimizerConfig(optimizer='s3', lr=0.018")
    assert {path.name for path in as_s3.iterdir()} >= {"metadata.json", ".metadata", "convert.json"}
    old, new = tensors(first, None), tensors(as_s3, None)
    for name, tensor in new.items():
        if "exp_pnorm" in name:
            v = old[name.replace("exp_pnorm", "exp_avg_sq")]
            assert torch.equal(tensor, square_root(v / (1 - 0.999**4))), name
    said = run(s3, "8", tmp_path / "on", as_s3)
    assert "step 8" in said and "step 4" not in said and "checksums verified" in said
    convert.convert(as_s3, back, "adam", lr_factor=3.0)
    assert "step 8" in run(adam, "8", tmp_path / "again", back)
    for name, tensor in tensors(back, None).items():
        torch.testing.assert_close(tensor, old[name], rtol=1e-5, atol=0)
    with pytest.raises(ConvertError, match="of --optimizer s3 already"):
        convert.convert(as_s3, tmp_path / "none", "s3")


@pytest.fixture
def damaged(first, tmp_path) -> Path:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in first.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_flipped_bit_is_refused_before_anything_is_loaded(program, damaged, tmp_path):
    file = max(damaged.glob("*.distcp"), key=lambda each: each.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    said = run(program, "8", tmp_path / "out", damaged, fails=True)
    assert f"AllRanksError: {file}" in said and "Nothing was loaded" in said
    assert "step 5" not in said
    unchecked = program.with_name("unchecked.py")
    text = program.read_text()
    unchecked.write_text(text.replace('"s3",', '"s3", plugin_no_verify_checkpoint=True,'))
    assert unchecked.read_text() != text
    assert "step 5" in run(unchecked, "8", tmp_path / "out", damaged)


@pytest.mark.parametrize(
    ("saved", "loads", "said"),
    [
        ('"adam"', '"s3"', "was saved by one of Megatron's own optimizers, whose state means noth"),
        ('"s3"', '"adam"', r"was saved by S3 \(SoftSignSGD\), whose state means nothing to one of"),
        ('"nadam"', '"adamw"', "was saved by NAdam"),
        ('"s3", s3_p=2.0', '"s3"', "was saved with p=2.0; its state means nothing with p=3"),
    ],
    ids=["adam into s3", "s3 into adam", "of the same states", "p"],
)
def test_another_optimizers_state_is_refused_by_name(program, saved, loads, said, tmp_path):
    """Before anything is loaded, on all ranks."""
    writing, reading = optimized_by(program, saved), optimized_by(program, loads)
    one = tmp_path / "one"
    run(writing, "1", one)
    output = run(reading, "2", tmp_path / "two", one, fails=True)
    assert len(re.findall(f"AllRanksError: {re.escape(str(one))} {said}", output)) == RANKS
    assert "step 2" not in output
