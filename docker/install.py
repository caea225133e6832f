"""What the Dockerfile installs, and the proof that the base image's packages stayed as they were.

Run inside the image while it is built, with the plugin's wheel beside this file.
"""

import argparse
import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

#: The plugin's extras that an image holds: what its verbs import besides torch and Megatron.
EXTRAS = ("data", "eval")
_PIN = re.compile(r"([\w.-]+)(?:\[[\w,.-]+\])?==([\w.+!-]+) *; *extra == ['\"](\w+)['\"]")
# Debian's own packages in a base may have versions that pip would refuse to read.
_PEP440 = re.compile(
    r"(\d+!)?\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[a-z0-9]+([._-][a-z0-9]+)*)?"
)
_PIP = (sys.executable, "-m", "pip", "install", "--no-cache-dir", "--only-binary=:all:")


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; the process's own when None.

    Returns:
        0; 1 if the image cannot be made so.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    torch = commands.add_parser("torch", help="install the torch that the plugin was tested with")
    torch.add_argument("--index-url", default="", help="where from; empty for pip's own setting")
    plugin = commands.add_parser("plugin", help="install megatron-core and the plugin")
    plugin.add_argument("--megatron-core", required=True, metavar="VERSION")
    plugin.add_argument("--version", required=True, help="the plugin's, or 'unknown'")
    args = parser.parse_args(argv)
    try:
        (wheel,) = Path(__file__).parent.glob("megatron_s3-*.whl")
        pins = tested_with(wheel)
        if args.command == "torch":
            index = ["--index-url", args.index_url] if args.index_url else []
            _run([*_PIP, *index, f"torch=={pins['torch']}"])
        else:
            _install(wheel, pins, args.megatron_core, args.version)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _install(wheel: Path, pins: dict[str, str], megatron_core: str, version: str) -> None:
    built = wheel.name.split("-")[1]
    if version not in ("unknown", built):
        raise RuntimeError(f"--build-arg VERSION={version}: the plugin's version is {built}")
    before = installed()
    beside = sorted(str(path) for path in wheel.parent.glob("*.whl") if path != wheel)
    if "torch" not in before:
        raise RuntimeError("the base image has no torch: BASE_IMAGE has to be an NGC PyTorch image")
    torch = digest("torch")
    wanted = {name: pins[name] for name in tested_with(wheel, "quickstart")}
    pins = {**pins, "megatron-core": megatron_core}
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(f"{line}\n" for line in constraints(before, pins)))
        file.flush()
        # An NGC image's own constraints (PIP_CONSTRAINT) are among the installed versions.
        ours = f"{wheel}[{','.join(EXTRAS)}]"
        _run([*_PIP, "--constraint", file.name, ours, *beside, *wanted], PIP_CONSTRAINT="")
    after = installed()
    changed = {
        name: f"{version} -> {after.get(name, 'gone')}"
        for name, version in before.items()
        if after.get(name) != version
    }
    if changed or digest("torch") != torch:
        raise RuntimeError(f"the base image's packages were changed: {changed or 'files of torch'}")
    print(f"torch {after['torch']} and {len(before)} packages of the base are as they were")
    print("added", *(f"{name}=={after[name]}" for name in sorted(set(after) - set(before))))


def tested_with(wheel: Path, *extras: str) -> dict[str, str]:
    """Returns the versions that the plugin was tested with, by name.

    Args:
        wheel: The plugin's.
        extras: The extras whose pins are asked for; those of all extras when none is given.
    """
    (dist,) = importlib.metadata.distributions(path=[str(wheel)])
    found = (_PIN.fullmatch(line) for line in dist.requires or [])
    return {_canonical(m[1]): m[2] for m in found if m and (not extras or m[3] in extras)}


def installed() -> dict[str, str]:
    """Version of every distribution that this Python finds, by canonical name; the first counts."""
    found: dict[str, str] = {}
    for dist in importlib.metadata.distributions():
        if name := dist.metadata["Name"]:  # None where a half-removed package left a folder
            found.setdefault(_canonical(name), dist.version)
    return found


def constraints(base: dict[str, str], pins: dict[str, str]) -> list[str]:
    """Lines for pip: the base's packages as they are, and `pins` for what it does not have."""
    return [
        f"{name}=={version}"
        for name, version in sorted({**pins, **base}.items())
        if _PEP440.fullmatch(version)
    ]


def digest(package: str) -> str:
    """SHA-256 over the names, sizes and times of the files of an installed package."""
    root = Path(str(importlib.metadata.distribution(package).locate_file(package)))
    if not root.is_dir():
        raise RuntimeError(f"{root} does not exist, although {package} is installed")
    total = hashlib.sha256(str(root).encode())
    for folder, folders, files in os.walk(root):
        if "__pycache__" in folders:
            folders.remove("__pycache__")
        folders.sort()
        for name in sorted(files):
            at = os.stat(os.path.join(folder, name))
            total.update(f"{folder}/{name} {at.st_size} {at.st_mtime_ns}\n".encode())
    return total.hexdigest()


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _run(command: list[str], **environment: str) -> None:
    print("$", *command, flush=True)
    # The Python of a base is for its packages alone, whatever the distribution says of pip.
    ours = {"PIP_ROOT_USER_ACTION": "ignore", "PIP_BREAK_SYSTEM_PACKAGES": "1"}
    status = subprocess.run(command, env={**os.environ, **ours, **environment}).returncode
    if status:
        raise RuntimeError(f"pip ended with status {status}; what it says is above")


if __name__ == "__main__":
    sys.exit(main())
