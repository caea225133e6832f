"""Which checkpoint is the newest and complete: what is named, and what a kill has left."""

from pathlib import Path

import pytest

from megatron_s3.storage import layout, newest
from megatron_s3.storage.newest import RELEASE, Unclear


def save(folder: Path, *iterations: int, last: str = layout.CONFIG) -> Path:
    """Iterations as far as a save of them went: to the file that it writes last."""
    for iteration in iterations:
        path = layout.folder_of(folder, iteration)
        path.mkdir(parents=True)
        (path / last).write_text("{}")
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(Unclear) as error:
        newest.newest(folder)
    return str(error.value)


def test_nothing_is_there(tmp_path: Path) -> None:
    assert newest.newest(tmp_path / "missing") is None
    (tmp_path / "file").touch()
    assert newest.newest(tmp_path / "file") is None
    layout.folder_of(tmp_path, 3).mkdir()  # killed in the first save
    assert newest.newest(tmp_path) is None
    assert newest.saved(tmp_path) == [3]


def test_what_is_named_is_it(tmp_path: Path) -> None:
    tracker = save(tmp_path, 3, 6, 10_000_000) / layout.TRACKER
    for named in ("3", "6\n", "10000000"):
        tracker.write_text(named)
        assert newest.newest(tmp_path) == int(named)
    tracker.write_text("release\n")
    assert newest.newest(tmp_path) == RELEASE
    tracker.write_text("5")
    assert refusal(tmp_path) == (
        f"{tracker} names iteration 5, and there is no {tmp_path}/iter_0000005"
    )
    for content in ("", "six", "-6", "6 3", "\u0666", "\0"):
        tracker.write_text(content)
        assert f"{tracker} names {content.strip()!r} instead of an iteration" == refusal(tmp_path)
    tracker.write_bytes(b"\xff6")
    assert "instead of an iteration" in refusal(tmp_path)
    tracker.unlink()
    tracker.mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        newest.newest(tmp_path)


def test_of_several_that_nothing_names_none_is_taken(tmp_path: Path) -> None:
    save(tmp_path, 3)
    layout.folder_of(tmp_path, 6).mkdir()  # killed in the second save, or before the file that
    assert newest.newest(tmp_path) == 3  # names the first
    save(tmp_path, 9)
    assert newest.complete(tmp_path) == [3, 9]
    assert refusal(tmp_path) == (
        f"{tmp_path / layout.TRACKER} is missing, and there are complete checkpoints beside it"
    )


@pytest.mark.parametrize("form", ["torch_dist", "torch_dcp", "fsdp_dtensor", "torch", None])
def test_complete_is_what_has_the_file_that_is_written_last(form: str | None, tmp_path: Path):
    config = layout.has_config(form)
    save(tmp_path, 3, last=layout.INDEX)
    assert newest.newest(tmp_path, config=config) == (None if config else 3)
    save(tmp_path, 6)
    assert newest.complete(tmp_path, config=config) == ([6] if config else [3, 6])
    (layout.folder_of(tmp_path, 6) / layout.CONFIG).write_text("{")
    assert 6 not in newest.complete(tmp_path, config=config)
    path = layout.folder_of(tmp_path, 9) / "mp_rank_00"
    path.mkdir(parents=True)
    assert 9 not in newest.complete(tmp_path, config=config)
    (path / "model_optim_rng.pt").touch()
    assert 9 in newest.complete(tmp_path, config=config)
    assert layout.is_of_format_torch(path.parent) and not layout.is_of_format_torch(tmp_path)


def test_names_of_folders(tmp_path: Path) -> None:
    for iteration in (0, 7, 12_345_678):
        assert layout.iteration_of(layout.folder_of(tmp_path, iteration)) == iteration
    for name in ("release", "iter_", "iter_7a", "7", "my_iter_0000007", "iter_\u0667"):
        assert layout.iteration_of(tmp_path / name) is None
