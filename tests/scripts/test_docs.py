"""Pages: their generated parts are up to date, their links lead somewhere, their blocks run."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from megatron_s3.report.tables import tables
from scripts.docs import pages, troubleshooting
from scripts.docs.parts import PARTS
from scripts.docs.recorded import suites
from tests.harness.trainer import REPOSITORY

PAGES = pages.pages()
NAMES = [page.relative_to(REPOSITORY).as_posix() for page in PAGES]

#: The README fits into a few screens; details stand in the folders' pages.
LONGEST_README = 200

BLOCKS = [
    (name, number, block)
    for name, page in zip(NAMES, PAGES, strict=True)
    for number, block in enumerate(pages.blocks(page.read_text(encoding="utf-8")), 1)
]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_generated_parts_of_a_page_are_up_to_date(page) -> None:
    text = page.read_text(encoding="utf-8")
    assert pages.filled(text, PARTS, page.name) == text, "run python -m scripts.docs"


def test_a_stale_part_is_made_anew() -> None:
    text = "a\n<!-- generated: numbers -->\nold\n<!-- end -->\nb\n"
    assert pages.filled(text, {"numbers": lambda: "new"}) == text.replace("old", "new")


@pytest.mark.parametrize(
    "text", ["<!-- generated: numbers -->\nno end\n", "<!-- generated: letters -->\n<!-- end -->\n"]
)
def test_a_part_that_cannot_be_made_is_an_error(text) -> None:
    with pytest.raises(pages.PageError):
        pages.filled(text, {"numbers": lambda: ""})


def test_each_cell_of_the_ecosystem_names_a_test() -> None:
    recorded = yaml.safe_load((REPOSITORY / "scripts/docs/ecosystem.yaml").read_text())
    for way, cells in recorded["ways"].items():
        assert len(cells) == len(recorded["capabilities"]), way
        for cell in filter(None, cells):
            path, _, name = cell.partition("::")
            assert f"\ndef {name}(" in (REPOSITORY / path).read_text(encoding="utf-8"), cell


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_links_of_a_page_lead_somewhere(page) -> None:
    text = page.read_text(encoding="utf-8")
    for link in pages.links(text):
        target, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        file = page.parent / target if target else page
        assert file.exists(), link
        assert file.resolve().is_relative_to(REPOSITORY), link
        if anchor:
            assert anchor in pages.anchors(file.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("folder", ["2026-11-30-cpu-length", "2026-11-30-cpu-robustness"])
def test_recorded_tables_are_those_of_the_recorded_runs(folder) -> None:
    """Except the one of times, which report.json holds with fewer digits."""
    record = REPOSITORY / "scripts/results" / folder
    written = (record / "tables.txt").read_text(encoding="utf-8")
    made = [t for t in tables(suites(record / "report.json")) if not t.title.endswith("speed")]
    assert len(made) == len(written.strip().split("\n\n")) - 1
    for table in made:
        assert str(table) in written, table.title


def test_the_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= LONGEST_README


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "number", "block"),
    [
        pytest.param(
            *block,
            id=f"{block[0]}-{block[1]}",
            marks=[] if block[0] == "README.md" else pytest.mark.thorough,
        )
        for block in BLOCKS
    ],
)
def test_a_runnable_block_runs(page, number, block, tmp_path) -> None:
    """In a folder that holds nothing but links to what lies at the top of the repository."""
    for each in REPOSITORY.iterdir():
        if not each.name.startswith(".git") and each.name != "runs":
            (tmp_path / each.name).symlink_to(each)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=tmp_path, env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    print(done.stdout[-3000:])
    assert done.returncode == 0, f"{page}, block {number}:\n{block}\n{done.stderr[-3000:]}"


def test_every_message_of_the_package_is_explained_once() -> None:
    listed = Counter(
        message
        for section in troubleshooting.entries().values()
        for entry in section
        for message in entry["messages"]
    )
    raised = {each.message: each.where for each in troubleshooting.raised()}
    missing = [f"{where}: {message}" for message, where in raised.items() if message not in listed]
    assert not missing, "add them to scripts/docs/errors"
    assert [message for message, count in listed.items() if count > 1] == []


def test_no_explained_message_is_out_of_date() -> None:
    """Messages that are put together from parts are compared word group by word group."""
    source = " ".join(
        troubleshooting.fixed_text(text)
        for file in (REPOSITORY / "megatron_s3").rglob("*.py")
        for text in troubleshooting.texts(file)
    )
    for section in troubleshooting.entries().values():
        for entry in section:
            assert set(entry) == {"messages", "cause", "cure"}, entry
            for message in entry["messages"]:
                for part in message.split("…"):
                    assert troubleshooting.fixed_text(part) in source, (message, part)
