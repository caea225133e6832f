"""Parts written by several processes, with progress."""

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
    """Another shard failed, or the user interrupted."""


class Progress:
    """Documents, speed and time left, on stderr."""

    def __init__(self, shards: list[Shard]) -> None:
        # A hub's file has no size that is known beforehand; then files are counted.
        known = all(s.size for s in shards)
        self._weights = [s.size if known else 1 for s in shards]
        self._total = len(shards)
        self._finished = 0
        self._left = sum(self._weights)
        self._here = 0  # of the weights, what this call has done
        self._done = [0, 0, 0]
        self._before = 0
        self._start = self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def resumed(self, number: int, part: dict[str, Any]) -> None:
        """Count a part that an earlier call has finished."""
        self._finished += 1
        self._left -= self._weights[number]
        for i, what in enumerate(("documents", "bytes", "tokens")):
            self._done[i] += sum(part[side][what] for side in dataset_parts.SPLITS)
        self._before = self._done[1]

    def add(self, documents: int, text: int, tokens: int) -> None:
        """Count a batch: documents, bytes of text, tokens."""
        for i, much in enumerate((documents, text, tokens)):
            self._done[i] += much
        self.show()

    def part(self, number: int) -> None:
        """Count a finished part."""
        self._finished += 1
        self._left -= self._weights[number]
        self._here += self._weights[number]

    def show(self, last: bool = False) -> None:
        """Print a line if it is time for one."""
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
    """Write the parts `todo` of `shards` into `folder`, with up to `workers` processes.

    Raises:
        DataError: If a shard is unusable. What is finished stays.
        IncompleteError: If a worker died or the hub cannot be reached.
    """
    workers = min(workers, len(todo))
    if workers <= 1:
        for number in todo:
            dataset_parts.write(folder, number, shards[number], tokenizer, split, progress.add)
            progress.part(number)
        return
    context = multiprocessing.get_context("forkserver")  # each worker would import for seconds
    context.set_forkserver_preload(["megatron_s3.data.preload"])
    stop, done = context.Event(), context.SimpleQueue()
    executor = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin, initargs=(stop, done, tokenizer, split)
    )
    try:
        futures = {
            executor.submit(_write, folder, number, shards[number]): number for number in todo
        }
        indexed.library()  # the merge will need it; the workers are busy meanwhile
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
            f"a worker process died, perhaps for lack of memory (--workers {workers})"
        ) from error
    finally:
        stop.set()
        # A worker that waits for room in the queue would not see it.
        while not done.empty():
            done.get()
        executor.shutdown(wait=True, cancel_futures=True)


#: Of this worker process, which an executor gives no other place to keep things in.
_worker: dict[str, Any] = {}


def _begin(stop: Any, done: Any, tokenizer: Tokenizer, split: tuple[int, int]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle

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
