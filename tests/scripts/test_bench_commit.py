"""Which commit a result names."""

import subprocess
from pathlib import Path

import pytest

from scripts.bench.commit import FILE, UNKNOWN, commit, write


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", *identity, "-C", folder, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(FILE, raising=False)
    (tmp_path / "file").write_text("one")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_git_is_asked_where_it_is(repository: Path) -> None:
    head = git(repository, "rev-parse", "HEAD")
    assert commit(repository) == {"commit": head, "changed": False}
    (repository / "file").write_text("two")
    assert commit(repository) == {"commit": head, "changed": True}


def test_a_copy_reads_what_was_written_for_it(repository: Path, monkeypatch) -> None:
    """And not the repository in which the copy lies."""
    copy = repository / "copy"
    copy.mkdir()
    assert commit(copy) == {"commit": UNKNOWN, "changed": None}
    write(copy / "COMMIT", repository)
    assert commit(copy) == commit(repository)
    (repository / "file").write_text("two")
    carried = repository / "carried"
    write(carried, repository)
    monkeypatch.setenv(FILE, str(carried))
    assert commit(copy) == {**commit(repository), "changed": True}


def test_what_is_unknown_stays_so(repository: Path) -> None:
    one, other = repository / "one", repository / "other"
    for folder in (one, other):
        folder.mkdir()
    write(other / "COMMIT", one)
    assert commit(other) == {"commit": UNKNOWN, "changed": None}
    (other / "COMMIT").write_text("")
    assert commit(other) == {"commit": UNKNOWN, "changed": None}
