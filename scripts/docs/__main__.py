"""Writes the generated parts of all pages; ``--check`` names the pages that are stale instead."""

import argparse
import sys

from scripts.docs import pages
from scripts.docs.parts import PARTS


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 1 where ``--check`` finds a page that is stale."""
    parser = argparse.ArgumentParser(prog="python -m scripts.docs", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(argv).check
    stale = 0
    for page in pages.pages():
        old = page.read_text(encoding="utf-8")
        name = page.relative_to(pages.REPOSITORY).as_posix()
        new = pages.filled(old, PARTS, name)
        if new == old:
            continue
        if check:
            stale += 1
            print(f"{name} is stale: run python -m scripts.docs")
        else:
            page.write_text(new, encoding="utf-8")
            print(f"{name} written")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
