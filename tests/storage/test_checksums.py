"""Damaged checkpoints are found, by name, bit by bit; whole ones of any origin are not."""

import io
import os
import pickle
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_s3.storage import archive, checksums
from megatron_s3.storage.errors import Damaged
from megatron_s3.storage.layout import SEAL
from megatron_s3.storage.newest import is_complete
from tests.harness.trainer import train

STATE = {"weight": torch.arange(70.0), "other": torch.ones(3, 5), "object": io.BytesIO(b"")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint as Megatron's, of two tensors and an object."""
    path = tmp_path / "iter_0000004"
    torch.save([1, {"a": 2}], STATE["object"])
    dcp.save(dict(STATE), checkpoint_id=path, no_dist=True)
    (path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    checksums.seal(path)
    return path


def judge(folder: Path) -> str:
    """What is said of a checkpoint, "" if nothing."""
    try:
        checksums.check(folder)
        checksums.verify(folder)
    except Damaged as error:
        return str(error)
    return ""


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def test_a_whole_checkpoint_is_found_whole_with_and_without_its_checksums(folder: Path) -> None:
    assert judge(folder) == ""
    (folder / SEAL).unlink()
    assert judge(folder) == ""


def test_every_bit_of_a_tensors_file_is_checked_or_has_no_effect(tmp_path: Path) -> None:
    """All 13,472 of them: what passes is loaded with the same values."""
    path = tmp_path / "one.pt"
    tensor = torch.arange(40.0)
    torch.save(tensor, path)
    data = bytearray(path.read_bytes())
    fd = os.open(path, os.O_RDWR)
    passed = 0
    for bit in range(len(data) * 8):
        at, changed = bit // 8, data[bit // 8] ^ (1 << bit % 8)
        os.pwrite(fd, bytes([changed]), at)
        try:
            archive.verify(fd, archive.Archive(path, 0, len(data), 160))
        except (archive.Differs, struct.error):
            pass
        else:
            passed += 1
            new = bytes(data[:at]) + bytes([changed]) + bytes(data[at + 1 :])
            assert torch.equal(torch.load(io.BytesIO(new), weights_only=True), tensor), bit
        os.pwrite(fd, data[at : at + 1], at)
    os.close(fd)
    assert 0 < passed < len(data) * 4  # padding, dates


@pytest.mark.parametrize("name", [".metadata", "metadata.json", SEAL])
def test_every_bit_of_a_small_file_is_checked(name: str, folder: Path) -> None:
    path = folder / name
    bits = path.stat().st_size * 8
    for bit in random.Random(1).sample(range(bits), min(bits, 300)):
        flip(path, bit)
        said = judge(folder)
        assert name in said, (bit, said)
        flip(path, bit)
    assert judge(folder) == ""


def test_an_index_without_checksum_has_to_agree_with_itself(folder: Path) -> None:
    (folder / SEAL).unlink()
    path = folder / ".metadata"
    whole = path.read_bytes()

    def changed(change) -> str:
        index = pickle.loads(whole)
        change(index)
        path.write_bytes(pickle.dumps(index))
        return judge(folder)

    def swap(index) -> None:
        one, other = (k for k in index.storage_data if k.fqn in ("weight", "other"))
        data = index.storage_data
        data[one], data[other] = data[other], data[one]

    def smaller(index) -> None:
        index.state_dict_metadata["weight"].size = torch.Size([69])

    def move(index) -> None:
        (key,) = (k for k in index.storage_data if k.fqn == "weight")
        index.storage_data[key].offset += 1

    assert "bytes where the index has" in changed(swap)
    assert "the shards of weight do not make up the tensor" in changed(smaller)
    assert "overlap or leave gaps" in changed(move)
    lacking = changed(lambda i: i.state_dict_metadata.pop("object"))
    assert "does not describe object exactly once" in lacking
    assert ".metadata cannot be read" in (path.write_bytes(whole[:50]) and judge(folder))
    path.write_bytes(whole.replace(b"properties", b"proPerties"))
    assert ".metadata cannot be read (AttributeError" in judge(folder)
    path.write_bytes(whole)
    assert judge(folder) == ""


def test_missing_and_cut_files_are_named(folder: Path) -> None:
    (data,) = folder.glob("*.distcp")
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    cut = f"{data} is truncated: {len(content) - 1:,} bytes, at least {len(content):,} expected"
    assert cut in judge(folder)
    data.unlink()
    assert judge(folder) == f"{data} is missing"
    data.write_bytes(content)
    for name in ("metadata.json", ".metadata"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        assert judge(folder).startswith(f"{folder / name} is missing")
        (folder / name).write_bytes(content)
    assert judge(folder) == ""


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_every_byte_is_in_one_share(of: int, folder: Path) -> None:
    (data,) = folder.glob("*.distcp")
    counts = [checksums.verify(folder, share, of) for share in range(of)]
    assert sum(counts) == data.stat().st_size
    content = data.read_bytes()
    for at in (
        content.index(STATE["weight"].numpy().tobytes()),
        content.index(b"\x00\x00\x80\x3f" * 9),
    ):
        flip(data, at * 8)
        found = []
        for share in range(of):
            try:
                checksums.verify(folder, share, of)
            except Damaged as error:
                found.append(str(error))
        assert len(found) == 1 and str(data) in found[0]
        flip(data, at * 8)


def test_a_file_of_the_older_format_is_checked_too(tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000004"
    path = folder / "mp_rank_00/model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    torch.save({"model": torch.ones(50)}, path)
    assert judge(folder) == ""
    flip(path, path.read_bytes().index(b"\x00\x00\x80\x3f" * 9) * 8)
    assert judge(folder).startswith(f"{path} is damaged (the checksum of ")
    torch.save(torch.ones(9), path.with_name("distrib_optim.pt"))
    path.write_bytes(b"")
    assert judge(folder).startswith(f"{path} is damaged")


def test_what_is_overwritten_is_not_complete_meanwhile(folder: Path) -> None:
    assert is_complete(folder)
    checksums.reopen(folder)
    assert not is_complete(folder)
    assert "metadata.json is missing" in judge(folder)
    shutil.rmtree(folder)
    assert not is_complete(folder)


def test_the_checksums_name_what_is_there_and_nothing_else(folder: Path) -> None:
    seal = folder / SEAL
    whole = seal.read_text()
    seal.write_text(whole + f"{'0' * 64}  another\n")
    assert f"{seal} is damaged" in judge(folder)
    seal.write_text("".join(reversed(whole.splitlines(keepends=True))))
    assert f"{seal} is damaged" in judge(folder)
    seal.write_text(whole)
    assert judge(folder) == ""


def test_a_format_without_that_file_has_its_index_for_it(folder: Path) -> None:
    for name in ("metadata.json", SEAL):
        (folder / name).unlink()
    assert not is_complete(folder)
    assert is_complete(folder, config=False)
    checksums.check(folder, config=False)
    checksums.seal(folder)
    assert (folder / SEAL).read_text().split()[1:] == [".metadata"]
    checksums.check(folder, config=False)
    flip(folder / ".metadata", 800)
    with pytest.raises(Damaged, match=r"/\.metadata does not match .*checksums\.sha256: "):
        checksums.check(folder, config=False)
    checksums.reopen(folder, config=False)
    assert not is_complete(folder, config=False)
    assert not (folder / SEAL).exists()
    with pytest.raises(Damaged, match=r"/\.metadata is missing"):
        checksums.check(folder, config=False)


def test_a_file_that_is_gone_after_another_was_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.pt", "b.pt"):
        torch.save(torch.ones(50), tmp_path / name)
    found = checksums._archives(tmp_path)
    monkeypatch.setattr(checksums, "_archives", lambda folder: found)
    assert checksums.verify(tmp_path) > 400
    (tmp_path / "b.pt").unlink()
    with pytest.raises(Damaged, match=r"/b\.pt cannot be read"):
        checksums.verify(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--use-distributed-optimizer", "--use-megatron-fsdp", "--ckpt-format", "fsdp_dtensor"],
        [
            "--use-torch-fsdp2",
            "--untie-embeddings-and-output-weights",
            "--ckpt-format",
            "torch_dcp",
        ],
    ],
    ids=lambda flags: flags[-1],
)
def test_the_trainer_refuses_a_damaged_shard_of_these_formats(
    flags: list[str], tmp_path: Path
) -> None:
    flags = ["--optimizer", "s3", "--bf16", *flags, "--save-interval", "3"]
    train(*flags, "--save", tmp_path, ranks=2)
    path = tmp_path / "iter_0000006" / "__1_0.distcp"
    content = bytearray(path.read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + 128)
    content[middle] = bytes(255 - byte for byte in content[middle])
    path.write_bytes(content)
    run = train(*flags, "--load", tmp_path, ranks=2, check=False)
    end = run.log[-5000:]
    assert run.returncode and not run.losses, end
    assert run.log.count(f"{path} is damaged (") == 1, end  # one rank speaks for all
    assert run.error.startswith(f"error: {path}") and "Traceback" not in run.log, end
    assert "Nothing was loaded. Choose an iteration with --ckpt-step; complete: 3." in run.log
