"""Paths of configurations: files of the user's, and those that came with the package."""

import difflib
import os
from pathlib import Path

from megatron_s3.launch.resolved import ConfigError

__all__ = ["find", "name_of", "shipped"]


def shipped() -> Path:
    """Returns the folder of the configurations that came with this package."""
    package = Path(__file__).parents[1]
    inside = package / "configs"  # as installed from the wheel
    return inside if inside.is_dir() else package.parent / "configs"


def find(name: str, beside: Path | None = None) -> tuple[Path, str]:
    """Finds the file that a user means by a path or by a shipped configuration's name.

    Args:
        name: ``my.yaml``, ``gpt2-7b-s3`` or ``configs/layouts/gpt2-7b-64gpu.yaml``.
        beside: the folder that a relative path is looked for in first; the working directory
            unless given.

    Raises:
        ConfigError: there is none; the message names the nearest.
    """
    given = Path(beside or ".") / name
    if given.is_file():
        return given, _shown(given)
    inside = shipped() / name.removeprefix("configs/")
    for candidate in (inside, inside.with_name(inside.name + ".yaml")):
        if candidate.is_file():
            return candidate, _shown(candidate)
    known = sorted(
        str(path.relative_to(shipped()).with_suffix("")) for path in shipped().rglob("*.yaml")
    )
    short = name.removeprefix("configs/").removesuffix(".yaml")
    near = difflib.get_close_matches(short, known, n=3, cutoff=0.5) or known
    raise ConfigError(
        f"{name}: no such file, and no shipped configuration; near: {', '.join(near)}"
    )


def _shown(path: Path) -> str:
    """Returns how messages call a file: from configs/ if the package brought it, else as given."""
    real = path.resolve()
    if real.is_relative_to(shipped().resolve()):
        return str(Path("configs") / real.relative_to(shipped().resolve()))
    return os.path.normpath(path)


def name_of(name: str) -> str:
    """Returns what names of runs call a file: ``configs/overlays/table-iv/3-s3`` table-iv-3-s3."""
    path = Path(find(name)[1]).with_suffix("")
    parts = path.parts if path.parts[0] == "configs" else path.parts[-1:]
    return "-".join(p for p in parts if p not in ("configs", "overlays", "layouts"))
