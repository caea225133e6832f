"""Real images, made on the spot: a base of this machine's system, Python and torch, and ours on it.

No registry is asked for an image. The base stands in for NGC's and for the one of Python: this
machine's release of Debian, the Python that runs the tests, and a torch that is there before ours
is built. That torch is not copied (it has 5 GB): the base holds links to it below ``/torch``, which
is mounted wherever an image is built or run.
"""

import hashlib
import importlib.metadata
import inspect
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAME = "localhost/megatron-s3-test"
CERTIFICATES = Path("/etc/ssl/certs")
SITE = Path(sysconfig.get_path("purelib"))
#: Ours asks for these, and NGC has them.
NGC = ("torch", "numpy", "matplotlib", "tensorboard", "psutil", "pyyaml", "packaging")
_TORCH = f"--volume={SITE}:/torch:ro"


def unusable() -> str | None:
    """Why no image can be made here; None if one can."""
    missing = [
        tool for tool in ("buildah", "podman", "runc", "debootstrap") if not shutil.which(tool)
    ]
    if missing:
        return f"not installed: {' '.join(missing)}"
    if os.geteuid() != 0:
        return "debootstrap and mounts of images need root"
    if Path(sys.base_prefix) in (Path("/"), Path("/usr")):
        return (
            f"{sys.base_prefix} is the system's Python; the base needs one in a folder of its own"
        )
    return None


def base(kind: str) -> str:
    """Name of a base image; it is made unless one of the same recipe and versions is there.

    Args:
        kind: ``python`` for a Python and torch, ``ngc`` for one with more of what NGC's has.
    """
    made_by = map(inspect.getsource, (base, _fill, _dress, _link))
    recipe = "|".join([*made_by, sys.version, *_links(NGC)])
    name = f"{NAME}/{kind}:{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if _call("buildah", "inspect", "--type=image", name, check=False).returncode == 0:
        return name
    container = _call("buildah", "from", "scratch" if kind == "python" else base("python")).stdout
    container = container.strip()
    try:
        root = Path(_call("buildah", "mount", container).stdout.strip())
        settings = ["--env=PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"]
        if kind == "python":
            _fill(root)
        else:
            _dress(root)
            settings = ["--env=PIP_CONSTRAINT=/etc/pip/constraint.txt"]
        _call("buildah", "config", *settings, container)
        _call("buildah", "commit", "--quiet", "--format=docker", container, name)
    finally:
        _call("buildah", "rm", container)
    return name


def build(target: str, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Build a target of the Dockerfile on `base`; the caller looks at the status.

    Args:
        target: Of the Dockerfile.
        name: Of the image.
        arguments: More words for buildah, such as ``--build-arg=X=Y``.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _call(
            "buildah", "build", "--isolation=chroot", "--format=docker", "--layers=false",
            "--file=docker/Dockerfile", f"--target={target}", f"--tag={name}",
            f"--build-arg=BASE_IMAGE={base('ngc')}", f"--build-arg=PYTHON_IMAGE={base('python')}",
            _TORCH, *pip_settings(Path(folder)), *arguments, ".",
            check=False,
        )  # fmt: skip


def run_words(image: str, *words: str, options: tuple[str, ...] = ()) -> list[str]:
    """The command line that runs `words` in `image`, alone or as a step of a job.

    Args:
        image: A name that `build` was given.
        words: What users put behind the name of the image.
        options: More words for podman, before the image.
    """
    return [
        "podman", "--cgroup-manager=cgroupfs", "--runtime=runc", "run", "--rm", "--network=host",
        "--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096",
        "--env=PYTHONPYCACHEPREFIX=/tmp/bytecode",  # once for all processes of the container
        _TORCH, *options, image, *words,
    ]  # fmt: skip


def run(image: str, *words: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run `words` in `image` (see `run_words`); output and errors are in ``stdout``."""
    return _call(*run_words(image, *words, options=options), check=False)


def remove(name: str) -> None:
    """Remove an image; the bases stay, for the next time."""
    _call("podman", "rmi", "--force", name)


def pip_settings(folder: Path) -> list[str]:
    """Words for buildah that give pip in the build the settings that it has here.

    They are mounted from `folder`, so that nothing of them stays in the image.  Beside them pip is
    told not to compile packages to bytecode, which would take most of its time; see `run_words`.
    """
    listed = _call(sys.executable, "-m", "pip", "config", "list").stdout.splitlines()
    values: dict[str, str] = {}
    for line in sorted(listed, key=lambda line: line.startswith(":env:")):  # as pip ranks them
        key, _, value = line.partition("=")
        values[key.rpartition(".")[2]] = value.strip("'\"")
    values["no-compile"] = "false"  # pip's own way to turn a "no" on
    where = folder / "pip.conf"
    where.write_text("[global]\n" + "".join(f"{k} = {v}\n" for k, v in values.items()))
    named = re.findall(r"(?:file://)?(/[^\s'\"]+)", " ".join(values.values()))
    # An index refers to files beside it, and a certificate is often a link to one.
    folders = {
        Path(n).parent if n.endswith(("/simple", ".crt", ".pem")) else Path(n) for n in named
    }
    mounts = [f"--volume={f}:{f}:ro" for f in sorted({*folders, CERTIFICATES}) if f.exists()]
    return [f"--volume={where}:/etc/pip.conf:ro", *mounts]


def _links(names: Iterable[str]) -> list[str]:
    """Entries of site-packages that these packages and what they require consist of."""
    seen: set[str] = set()
    todo = list(names)
    entries: set[str] = set()
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            dist = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another system or Python
        entries |= {f.parts[0] for f in dist.files or [] if f.parts[0] not in ("..", "__pycache__")}
        # cuda-toolkit is nothing but extras.
        wanted = [r for r in dist.requires or [] if "extra ==" not in r or name == "cuda-toolkit"]
        todo += [re.split(r"[^\w.-]", r, maxsplit=1)[0] for r in wanted]
    return sorted(entries)


def _fill(root: Path) -> None:
    """Put a system, Python in /usr/local, pip, and links to torch into the empty folder `root`."""
    prefix = Path(sys.base_prefix)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    library = prefix / "lib" / version
    binaries = [*prefix.glob("lib/libpython*.so*"), *library.glob("lib-dynload/*.so")]
    binaries = [b for b in binaries if "_tkinter" not in b.name] + [prefix / "bin" / version]
    needed = re.findall(r"=> (/\S+)", _call("ldd", *map(str, binaries)).stdout)
    owners = [_owner(Path(path)) for path in set(needed) if not path.startswith(str(prefix))]
    packages = sorted({o for o in owners if o} | {"ca-certificates"})
    suite = platform.freedesktop_os_release()["VERSION_CODENAME"]
    include = f"--include={','.join(packages)}"
    _call("debootstrap", "--variant=minbase", include, suite, str(root))
    shutil.rmtree(root / "var/cache/apt")
    shutil.rmtree(root / "var/lib/apt/lists")

    local = root / "usr/local"
    ignore = shutil.ignore_patterns("test", "idlelib", "site-packages", "__pycache__", "config-*")
    shutil.copytree(library, local / "lib" / version, ignore=ignore)
    for path in prefix.glob("lib/libpython*.so*"):
        shutil.copy2(path, local / "lib" / path.name)
    shutil.copy2((prefix / "bin" / version).resolve(), local / "bin" / version)
    for name in ("python3", "python"):
        (local / "bin" / name).symlink_to(version)
    site = local / "lib" / version / "site-packages"
    site.mkdir()
    for path in (library / "site-packages").glob("pip*"):
        shutil.copytree(path, site / path.name, ignore=ignore)
    _call("chroot", str(root), "ldconfig")
    _link(root, "torch")


def _dress(root: Path) -> None:
    """Add what an NGC image has and a plain one has not, where it matters to ours."""
    _link(root, *NGC)
    nvidia = root / "opt/nvidia/nvidia_entrypoint.sh"
    nvidia.parent.mkdir()
    nvidia.write_text('#!/bin/bash\necho "the banner of the base"\nexec "$@"\n')
    nvidia.chmod(0o755)
    torch = importlib.metadata.version("torch")
    (root / "etc/pip").mkdir()
    (root / "etc/pip/constraint.txt").write_text(f"torch=={torch}\nmegatron-core==0.0.1\n")
    # Ubuntu's images have a user 1000 already.
    _call("chroot", str(root), "/usr/sbin/useradd", "--uid=1000", "ubuntu")


def _link(root: Path, *names: str) -> None:
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    site = root / "usr/local/lib" / version / "site-packages"
    for entry in _links(names):
        if not (site / entry).is_symlink():
            (site / entry).symlink_to(f"/torch/{entry}")


def _owner(path: Path) -> str | None:
    """The package that brought a library; dpkg knows some only by the name without the link."""
    for candidate in (path, path.resolve(), Path("/usr") / path.relative_to("/")):
        found = _call("dpkg-query", "--search", str(candidate), check=False)
        if found.returncode == 0:
            return found.stdout.partition(":")[0]
    return None


def _call(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stdout[-4000:]}")
    return done
