"""Worker processes that write the parts, and their progress."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from megatron_s3.data import dataset_parts, indexed
from megatron_s3.data.errors import IncompleteError
from megatron_s3.data.shards import Shard
from megatron_s3.data.tokenizers import Tokenizer
from megatron_s3.errors import MegatronS3Error


class _StoppedError(MegatronS3Error):
    """The end of a worker because another shard failed or the user interrupted."""


class Progress:
    """Lines on stderr with the number of documents, the speed and the time left."""

    def __init__(self, shards: list[Shard]) -> None:
        # The size of a file on the hub is not known in advance; then files are counted.
        known = all(s.size for s in shards)
        self._weights = [s.size if known else 1 for s in shards]
        self._total = len(shards)
        self._finished = 0
        self._left = sum(self._weights)
        self._here = 0  # the weights of the parts that this call has finished
        self._done = [0, 0, 0]
        self._before = 0
        self._start = self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def resumed(self, number: int, part: dict[str, Any]) -> None:
        """Counts a part that an earlier call has finished."""
        self._finished += 1
        self._left -= self._weights[number]
        for i, what in enumerate(("documents", "bytes", "tokens")):
            self._done[i] += sum(part[side][what] for side in dataset_parts.SPLITS)
        self._before = self._done[1]

    def add(self, documents: int, text: int, tokens: int) -> None:
        """Counts the documents, bytes of text and tokens of a batch."""
        for i, much in enumerate((documents, text, tokens)):
            self._done[i] += much
        self.show()

    def part(self, number: int) -> None:
        """Counts a finished part."""
        self._finished += 1
        self._left -= self._weights[number]
        self._here += self._weights[number]

    def show(self, last: bool = False) -> None:
        """Prints a line if enough time has passed since the last one."""
        now = time.monotonic()
        quiet = self._shown == self._start
        if now - self._shown < (1 if self._terminal else 10) and not (last and not quiet):
            return
        self._shown = now
        documents, text, tokens = self._done
        elapsed = now - self._start
        eta = ""
        if self._here and self._left:
            seconds = round(elapsed * self._left / self._here)
            eta = f", {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
        line = (
            f"part {self._finished}/{self._total}: {documents:,} documents, {text / 1e6:,.1f} MB, "
            f"{tokens:,} tokens, {(text - self._before) / 1e6 / elapsed:.2f} MB/s{eta}"
        )
        if self._terminal:
            print(f"\r\033[K{line}", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


def write_parts(
    folder: str,
    shards: list[Shard],
    todo: list[int],
    tokenizer: Tokenizer,
    split: tuple[int, int],
    workers: int,
    progress: Progress,
) -> None:
    """Writes the parts `todo` of `shards` into `folder`, with up to `workers` processes.

    Raises:
        DataError: If a shard is unusable. Finished parts are kept.
        IncompleteError: If a worker died or the hub cannot be reached.
    """
    workers = min(workers, len(todo))
    if workers <= 1:
        for number in todo:
            dataset_parts.write(folder, number, shards[number], tokenizer, split, progress.add)
            progress.part(number)
        return
    context = multiprocessing.get_context("forkserver")  # imports take each worker seconds
    context.set_forkserver_preload(["megatron_s3.data.preload"])
    stop, done = context.Event(), context.SimpleQueue()
    executor = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin, initargs=(stop, done, tokenizer, split)
    )
    try:
        futures = {
            executor.submit(_write, folder, number, shards[number]): number for number in todo
        }
        indexed.library()  # for the merge; imported while the workers are busy
        left = set(futures)
        while left:
            ended, left = wait(left, timeout=0.5, return_when=FIRST_EXCEPTION)
            while not done.empty():
                progress.add(*done.get())
            for future in sorted(ended, key=futures.__getitem__):
                future.result()
                progress.part(futures[future])
            progress.show()
    except BrokenProcessPool as error:
        raise IncompleteError(
            f"a worker process died, perhaps because memory ran out; use fewer than --workers "
            f"{workers}"
        ) from error
    finally:
        stop.set()
        # A worker that waits for space in the queue would not see the event.
        while not done.empty():
            done.get()
        executor.shutdown(wait=True, cancel_futures=True)


#: Objects of this worker process; an executor offers no other place for them.
_worker: dict[str, Any] = {}


def _begin(stop: Any, done: Any, tokenizer: Tokenizer, split: tuple[int, int]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles it

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        if parent:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _worker.update(stop=stop, done=done, tokenizer=tokenizer, split=split)


def _write(folder: str, number: int, shard: Shard) -> None:
    def report(*much: int) -> None:
        if _worker["stop"].is_set():
            raise _StoppedError
        _worker["done"].put(much)

    if _worker["stop"].is_set():
        raise _StoppedError
    dataset_parts.write(folder, number, shard, _worker["tokenizer"], _worker["split"], report)
