"""Paths of configurations: the user's files and those in the package."""

import difflib
import os
from pathlib import Path

from megatron_s3.launch.resolved import ConfigError

__all__ = ["find", "name_of", "shipped"]


def shipped() -> Path:
    """Returns the folder of the configurations in this package."""
    package = Path(__file__).parents[1]
    inside = package / "configs"  # installed from a wheel
    return inside if inside.is_dir() else package.parent / "configs"


def find(name: str, beside: Path | None = None) -> tuple[Path, str]:
    """Finds a file by its path or by the name of a shipped configuration.

    Args:
        name: ``my.yaml``, ``gpt2-7b-s3`` or ``configs/layouts/gpt2-7b-64gpu.yaml``.
        beside: the folder in which a relative path is looked up first; the current folder by
            default.

    Raises:
        ConfigError: no such file; the message names similar ones.
    """
    given = Path(beside or ".") / name
    inside = shipped() / name.removeprefix("configs/")
    for path in (given, inside, Path(f"{inside}.yaml")):
        if os.path.isfile(path):  # unlike Path.is_file it raises nothing, whatever the name is
            return path, _shown(path)
    known = sorted(
        str(path.relative_to(shipped()).with_suffix("")) for path in shipped().rglob("*.yaml")
    )
    short = name.removeprefix("configs/").removesuffix(".yaml")
    near = difflib.get_close_matches(short, known, n=3, cutoff=0.5)
    if os.path.isdir(given):
        raise ConfigError(f"{name}: it is a folder, not a file; give one YAML file of it")
    remedy = f"similar names: {', '.join(near)}" if near else "megatron-s3 configs lists the names"
    raise ConfigError(f"{name}: no such file or shipped configuration; {remedy}")


def _shown(path: Path) -> str:
    """Returns the name of a file in messages: from configs/ for a shipped file, else as given."""
    real = path.resolve()
    if real.is_relative_to(shipped().resolve()):
        return str(Path("configs") / real.relative_to(shipped().resolve()))
    return os.path.normpath(path)


def name_of(name: str) -> str:
    """Returns a file's part of a run's name: table-iv-3-s3 for configs/overlays/table-iv/3-s3."""
    path = Path(find(name)[1]).with_suffix("")
    parts = path.parts if path.parts[0] == "configs" else path.parts[-1:]
    return "-".join(p for p in parts if p not in ("configs", "overlays", "layouts"))
