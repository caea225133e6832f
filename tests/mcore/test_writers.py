"""Failed writes and dead writers of asynchronous checkpoints, with Megatron's own functions."""

import gc
import io
import os
import signal

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
