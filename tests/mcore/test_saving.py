"""Saving, step by step: when a folder is complete, when no longer, and why a save failed."""

import os
import traceback
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from tests.mcore.checkpoints import TRACKER, flags, write
from tests.mcore.library import globally, on_ranks

REMOTE = "msc://bucket/iter_0000006"


@on_ranks(1)
def test_what_is_written_over_is_complete_no_more(tmp_path):
    from megatron_s3.mcore.checkpoint import saving

    folder = write(tmp_path, 6) / "iter_0000006"
    ends = [folder / "metadata.json", folder / "checksums.sha256"]
    seen = []
    saving.save(lambda state, path: seen.append([end.exists() for end in ends]), {}, folder)
    assert seen == [[False, False]]
    saving.save_config(lambda config, path: ends[0].write_text("{}"), {}, folder)
    assert all(end.exists() for end in ends)


@on_ranks(1)
def test_an_object_store_is_megatrons(tmp_path):
    """Where its address, as a path, is a folder, nothing happens to that either."""
    from megatron_s3.mcore.checkpoint import saving

    os.chdir(tmp_path)
    folder = write(tmp_path / "msc:/bucket", 6) / "iter_0000006"
    seal = folder / "checksums.sha256"
    saving.save(lambda state, path: None, {}, REMOTE)
    assert seal.exists()
    seal.unlink()
    saving.save_config(lambda config, path: None, {}, REMOTE)
    assert not seal.exists()


@on_ranks(1)
def test_the_tracker_file_is_whole_and_on_the_disk_or_as_it_was(tmp_path):
    from megatron_s3.mcore.checkpoint import saving
    from megatron_s3.storage import checksums

    tracker, sizes, fsync = tmp_path / TRACKER, [], os.fsync

    def note(file):
        sizes.append(os.fstat(file).st_size)
        fsync(file)

    saving.os.fsync = note
    for text in ("3", "release"):
        with saving.open_file(open, str(tracker), mode="w") as file:
            file.write(text)
            assert tracker.exists() is (text != "3")
        assert tracker.read_text() == text and sizes.pop() == len(text) and not sizes
    with saving.open_file(open, str(tracker)) as file:
        assert file.read() == "release"
    with saving.open_file(open, str(tmp_path / "another"), "w"):
        assert (tmp_path / "another").exists()
    # What it names is sealed first.
    (write(tmp_path, 6) / "iter_0000006" / "checksums.sha256").unlink()

    def fails(folder):
        raise OSError("of the disk")

    checksums.seal = fails
    with (
        pytest.raises(OSError, match="of the disk"),
        saving.open_file(open, str(tracker), "w") as file,
    ):
        file.write("6")
    assert tracker.read_text() == "release"


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("sealed", [False, True])
@on_ranks(1)
def test_a_folder_is_sealed_that_has_an_index_and_was_not(index, sealed, tmp_path):
    from megatron_s3.mcore.checkpoint import saving
    from megatron_s3.storage import checksums

    folder = write(tmp_path, 6) / "iter_0000006"
    (folder / "metadata.json").unlink()
    for name, there in ((".metadata", index), ("checksums.sha256", sealed)):
        if not there:
            (folder / name).unlink()
    calls = []
    checksums.seal = calls.append
    with saving.open_file(open, str(tmp_path / TRACKER), "w") as file:
        file.write("6")
    assert calls == ([folder] if index and not sealed else [])


KINDS = {
    # name: what save_checkpoint is called with, Megatron's arguments, whether the index goes.
    "torch_dcp": ({}, {"ckpt_format": "torch_dcp"}, True),
    "torch_dist": ({}, {}, False),  # whose writing is wrapped itself
    "non-persistent": ({"non_persistent_ckpt": True}, {"ckpt_format": "torch_dcp"}, False),
    "a release": ({"release": True}, {"ckpt_format": "torch_dcp"}, False),
    "an object store": ({}, {"ckpt_format": "torch_dcp", "save": "msc://bucket"}, False),
}


@pytest.mark.parametrize("kind", KINDS)
@on_ranks(1)
def test_where_torch_writes_by_itself_the_index_goes_first(kind, tmp_path):
    from megatron_s3.mcore.checkpoint import saving

    os.chdir(tmp_path)
    kwargs, settings, goes = KINDS[kind]
    save = tmp_path / "msc:/bucket" if "save" in settings else tmp_path
    folder = write(save, 6) / "iter_0000006"
    before = sorted(path.name for path in folder.iterdir())
    left = [name for name in before if name not in (".metadata", "checksums.sha256")]
    with globally(flags(**{"save": str(save)} | settings)):
        saving.save_checkpoint(lambda iteration, **kwargs: None, 6, **kwargs)
    assert sorted(path.name for path in folder.iterdir()) == (left if goes else before)


@on_ranks(2)
def test_the_first_rank_alone_does_so(tmp_path):
    from megatron_s3.mcore.checkpoint import saving
    from megatron_s3.storage import checksums

    calls = []
    checksums.reopen = lambda folder, config: calls.append(folder)
    with globally(flags(save=str(tmp_path), ckpt_format="torch_dcp")):
        saving.save_checkpoint(lambda iteration: None, 6)
    assert len(calls) == (torch.distributed.get_rank() == 0)


def failing(error: BaseException, save: Path, reason: str | None) -> BaseException:
    from megatron_s3.mcore.checkpoint import saving

    def original(iteration):
        held = "a view of a buffer"
        error.args += (len(held),)
        raise error

    saving.why_not = lambda folder: reason
    with globally(flags(save=str(save))), pytest.raises(BaseException) as caught:
        saving.save_checkpoint(original, 6)
    return caught.value


@on_ranks(1)
def test_a_failed_save_says_where_and_why_if_it_is_the_disk(tmp_path):
    from torch.distributed.checkpoint.api import CheckpointException

    from megatron_s3.mcore.checkpoint.saving import SaveFailed

    of_torch = CheckpointException("write", {0: (OSError("of the disk"), None)})
    for error in (RuntimeError("unexpected pos"), of_torch):
        found = failing(error, tmp_path, "No space left on device")
        assert type(found) is SaveFailed
        assert str(found) == (
            f"iteration 6 could not be saved to {tmp_path}: No space left on device. There is no "
            "complete checkpoint."
        )
        (*_, frame) = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
        assert frame.f_code.co_name == "original" and "held" not in frame.f_locals
    # What was said is not said again, and what is no fault of the disk is Megatron's.
    for error in (SaveFailed("said already"), KeyError("of another kind")):
        reason = None if isinstance(error, KeyError) else "No space left on device"
        assert failing(error, tmp_path, reason) is error
    write(tmp_path, 3, 4)
    assert str(failing(OSError("of the disk"), tmp_path, "it is full")).endswith(
        "it is full. The newest complete checkpoint there is iteration 4."
    )


@on_ranks(1)
def test_a_failed_end_of_an_asynchronous_save_says_so_too(tmp_path):
    from megatron_s3.mcore.checkpoint import saving

    def original():
        raise OSError("of the disk")

    saving.why_not = lambda folder: "it is full"
    said = r"a checkpoint could not be saved to .*: it is full\. There is no complete"
    with globally(Namespace(save=str(tmp_path))), pytest.raises(saving.SaveFailed, match=said):
        saving.maybe_finalize_async_save(original)
