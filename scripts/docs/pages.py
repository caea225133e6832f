"""The pages of the project: where they are, and the parts of them that the code makes."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["REPOSITORY", "PageError", "anchors", "blocks", "filled", "links", "pages"]

REPOSITORY = Path(__file__).parents[2]

_PART = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_FENCE = re.compile(r"^```.*?^```\n?", re.MULTILINE | re.DOTALL)


class PageError(ValueError):
    """A page that cannot be filled, with the name of the page."""


def pages(root: Path = REPOSITORY) -> list[Path]:
    """Returns the Markdown pages that a reader opens, sorted by path.

    Recorded results under ``scripts/results/DATE`` are data and not pages.
    """
    folders = ("configs", "docker", "megatron_s3", "patches", "scripts", "tests")
    found = [root / "README.md"]
    found += [page for folder in folders for page in (root / folder).rglob("*.md")]
    return sorted(page for page in found if not re.search(r"/results/\d", page.as_posix()))


def filled(text: str, parts: Mapping[str, Callable[[], str]], name: str = "page") -> str:
    """Returns a page's text with each generated part made anew.

    Args:
        text: the page.
        parts: functions that return the text of a part, by the name of the part.
        name: what an error calls the page.

    Raises:
        PageError: a part has an unknown name, or its end is missing.
    """
    starts = re.findall(r"<!-- generated: (.*?) -->", text)
    complete = [found[1] for found in _PART.findall(text)]
    if starts != complete:
        raise PageError(f"{name}: a generated part has no <!-- end -->: {starts} and {complete}")
    unknown = [part for part in starts if part not in parts]
    if unknown:
        raise PageError(f"{name}: no part is named {unknown[0]}; there are {', '.join(parts)}")
    return _PART.sub(lambda found: found[1] + parts[found[2]]().strip("\n") + "\n" + found[3], text)


def blocks(text: str) -> list[str]:
    """Returns the shell blocks of a page that are marked as runnable."""
    return re.findall(r"^<!-- runnable -->\n```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def links(text: str) -> list[str]:
    """Returns the targets of a page's links and pictures, without those of code blocks."""
    prose = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text))
    return re.findall(r"\]\(([^)\s]+)\)", prose)


def anchors(text: str) -> set[str]:
    """Returns the anchors that GitHub gives to the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", _FENCE.sub("", text), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        count = sum(1 for each in found if re.fullmatch(re.escape(anchor) + r"(-\d+)?", each))
        found.add(f"{anchor}-{count}" if count else anchor)
    return found
