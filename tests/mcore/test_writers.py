"""Failed writes and dead writers of asynchronous checkpoints, with Megatron's own functions."""

import functools
import gc
import io
import os
import signal
from argparse import Namespace

import pytest

from tests.mcore.library import on_ranks


@on_ranks(1)
def test_a_failed_write_does_not_kill_the_process_that_wrote() -> None:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

    item = WriteItem(index=MetadataIndex("rng_state"), type=WriteItemType.BYTE_IO)
    bucket = ("/dev/full", "__0_0.distcp", ([(item, io.BytesIO(bytes(1 << 20)))], []))
    number, error = FileSystemWriterAsync.write_preloaded_data(
        [_StorageWriterTransforms()], 0, bucket, None, None, True
    )
    assert number == 0
    assert "No space left on device" in str(error)
    del bucket, error
    gc.collect()  # SIGSEGV in CPython where a traceback still holds a view of the bytes


@on_ranks(1)
@pytest.mark.parametrize("busy", [False, True])
def test_a_dead_writer_is_an_error(busy: bool) -> None:
    from megatron.core.dist_checkpointing.strategies.async_utils import (
        AsyncRequest,
        PersistentAsyncCaller,
    )

    from megatron_s3.mcore.checkpoint.async_writers import WriterDied

    caller = PersistentAsyncCaller()
    # As Megatron's trainer starts it (megatron/training/async_utils.py).
    caller.process = PersistentAsyncCaller._get_process(0, mp_mode="fork")
    request = AsyncRequest(signal.pause, (), [])
    if busy:
        caller.schedule_async_call(request)
        assert not caller.is_current_async_call_done(blocking=False, no_dist=True)
    os.kill(caller.process.pid, signal.SIGKILL)
    caller.process.join()
    try:
        if busy:
            with pytest.raises(WriterDied, match=r"was killed by signal 9.*newest complete"):
                caller.is_current_async_call_done(blocking=True, no_dist=True)
        else:
            with pytest.raises(WriterDied, match=r"was killed by signal 9.*newest complete"):
                caller.schedule_async_call(request)
    finally:
        caller.process = None  # or Megatron's destructor waits for it


def failed(cause: Exception | None = None) -> Exception:
    """An error whose traceback holds a local variable, ``held``."""
    held = io.BytesIO()
    try:
        raise OSError(f"of the disk, with {held}") from cause
    except OSError as error:
        return error


def held_by(error: BaseException) -> dict:
    return error.__traceback__.tb_frame.f_locals


@on_ranks(1)
def test_what_failed_lets_go_of_all_that_its_causes_held() -> None:
    """Of a cause, of the error in whose handling it came, and of those of each rank in torch's."""
    from torch.distributed.checkpoint.api import CheckpointException

    from megatron_s3.mcore.checkpoint.async_writers import clear_frames, write_preloaded_data

    cause, context, of_a_rank = failed(), failed(), failed()
    error = failed(cause)
    cause.__context__ = context
    whole = CheckpointException("write", {1: (of_a_rank, None)})
    whole.__cause__, context.__cause__ = error, whole  # a cycle, too
    every = (cause, context, of_a_rank, error)
    assert all("held" in held_by(each) for each in every)
    clear_frames(whole)
    assert not any("held" in held_by(each) for each in every)
    assert write_preloaded_data(lambda: None) is None  # what it returns to a queue


class Caller:
    """As much of Megatron's as is asked: its process has ended."""

    def __init__(self, exitcode: int, *, answered: bool = False, read: bool = False) -> None:
        self.process = Namespace(exitcode=exitcode)
        self.cur_item = "read" if read else None
        self._persistent_comp_q = Namespace(empty=lambda: not answered)


@on_ranks(1)
def test_a_writer_that_answered_before_it_ended_is_no_error() -> None:
    from megatron_s3.mcore.checkpoint.async_writers import WriterDied, is_current_async_call_done

    done = functools.partial(is_current_async_call_done, lambda caller, *rest: rest)
    assert done(Caller(-9, answered=True), True, True) == (True, True)
    assert done(Caller(-9, read=True), False, True) == (False, True)
    with pytest.raises(
        WriterDied, match="ended with status 0, so the last checkpoint is incomplete"
    ):
        done(Caller(0))
