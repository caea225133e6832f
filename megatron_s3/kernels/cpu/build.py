"""Compilation and cache of the CPU kernel."""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from megatron_s3.errors import MegatronS3Error
from megatron_s3.kernels.cpu.sole_builder import sole_builder
from megatron_s3.rules import RULES
from megatron_s3.rules.kernel_form import KernelForm, cpp_declarations, kernel_of

__all__ = ["library_of"]

_SOURCE = Path(__file__).with_name("step.cpp")
_RULES = Path(__file__).with_name("rules.h")
_COMPILERS = ("c++", "g++", "clang++")
# Without -ffast-math and without contraction every operation is IEEE arithmetic.
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"),
    *("-ffp-contract=off", "-fPIC", "-shared"),
)
_PATIENCE = 300  # seconds; a build takes a few

_lock = threading.Lock()
#: The libraries, or why they could not be built, by rule (None: all of the plugin's rules).
_loaded: dict[KernelForm | None, ctypes.CDLL | str] = {}


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()  # the thread that may hold it does not exist in a forked process


os.register_at_fork(after_in_child=_renew_lock)


def library_of(kernel: KernelForm | None = None) -> ctypes.CDLL | str:
    """Returns the compiled library that holds a rule, or why there is none; it tries only once."""
    if kernel is not None and kernel.own:
        kernel = None
    if kernel not in _loaded:
        with _lock:
            if kernel not in _loaded:
                _loaded[kernel] = _compiled(_source(kernel))
    return _loaded[kernel]


#: Files by name, :file:`step.cpp` among them.
_Source = dict[str, bytes]


def _source(kernel: KernelForm | None) -> _Source:
    """Returns the source files of a rule's library; of the plugin's rules if None."""
    if kernel is None:
        kernels = [kernel_of(rule) for rule in RULES]
        rules = _RULES.read_bytes()
    else:
        kernels, rules = [kernel], (kernel.cpp or "").encode()
    declarations = "\n".join(map(cpp_declarations, kernels)).encode()
    return {
        "step.cpp": _SOURCE.read_bytes(),
        "declarations.h": declarations,
        "rules.h": rules,
    }


def _compiled(source: _Source) -> ctypes.CDLL | str:
    try:
        compiler = _compiler()
        if isinstance(compiler, str):
            return _built_elsewhere(source) or compiler
        try:
            # They contain the compiler's version and the instruction sets of this CPU
            # (-march=native): nodes with different CPUs may share a home folder.
            macros = _run([*compiler, *_FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
            key = hashlib.sha256(repr((source, compiler, _FLAGS, macros)).encode()).hexdigest()
            return _cached(compiler, f"{_stem(source)}-{key[:24]}.so", source)
        except _CompilerError as error:
            return _built_elsewhere(source) or f"the C++ compiler failed: {error}"
    except OSError as error:
        return f"the C++ kernel cannot be built or loaded: {error}"


def _stem(source: _Source) -> str:
    """Returns the beginning of the names of all files built from this source on this CPU type."""
    try:
        about = Path("/proc/cpuinfo").read_text()
    except OSError:
        about = ""
    # x86 says "flags", Arm "Features": the instruction sets.
    sets = [line for line in about.splitlines() if line.startswith(("flags", "Features"))][:1]
    known = repr((source, _FLAGS, platform.machine(), sets))
    return f"cpu-{hashlib.sha256(known.encode()).hexdigest()[:12]}"


def _built_elsewhere(source: _Source) -> ctypes.CDLL | None:
    """Returns a library that was built where there was a compiler, as in an earlier image stage."""
    for folder in _cache_folders():
        for path in sorted(folder.glob(f"{_stem(source)}-*.so")):
            if _is_whole(path):
                return _load(path)
    return None


def _compiler() -> list[str] | str:
    """Returns the compiler's command, or why there is none."""
    if cxx := os.environ.get("CXX", "").strip():
        try:
            command = shlex.split(cxx)
        except ValueError:
            command = [cxx]
        if shutil.which(command[0]):
            return command
        return f"no C++ compiler: CXX is {command[0]}, which is not in PATH"
    for name in _COMPILERS:
        if path := shutil.which(name):
            return [path]
    return f"no C++ compiler: none of {', '.join(_COMPILERS)} is in PATH, and CXX is not set"


class _CompilerError(MegatronS3Error):
    pass


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE
        )
    except subprocess.TimeoutExpired as error:
        raise _CompilerError(f"no result within {_PATIENCE} seconds") from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line] or lines
        raise _CompilerError(errors[0] if errors else f"exit status {done.returncode}")
    return done.stdout


def _cached(compiler: list[str], name: str, source: _Source) -> ctypes.CDLL:
    for folder in _cache_folders():
        path = folder / name
        try:
            if not _is_whole(path):
                done = functools.partial(_is_whole, path)
                with sole_builder(path, "the C++ kernel", done, _PATIENCE):
                    if not _is_whole(path):
                        _build(compiler, path, source)
            return _load(path)
        except OSError:
            continue  # not writable, full, or mounted noexec
    with tempfile.TemporaryDirectory(prefix="megatron-s3-") as temporary:
        path = Path(temporary) / name
        _build(compiler, path, source)
        return _load(path)  # a loaded library outlives its file


def _cache_folders() -> Iterator[Path]:
    """Yields torch's folder of compiled extensions, then the user's folder in the temporary one."""
    try:
        root = os.environ.get("TORCH_EXTENSIONS_DIR")
        if not root:
            cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            root = os.path.join(cache, "torch_extensions")
        folder = Path(root) / "megatron_s3"
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except (OSError, RuntimeError):  # RuntimeError: no home
        pass
    try:
        folder = Path(tempfile.gettempdir()) / f"megatron-s3-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return
    # Others may write to the folder above, so only a folder that is closed to them is used.
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
        yield folder


def _build(compiler: list[str], path: Path, source: _Source) -> None:
    """Compiles to a temporary file and renames it, so that processes may build at the same time."""
    with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as temporary:
        file = Path(temporary) / path.name
        for name, text in source.items():
            (Path(temporary) / name).write_bytes(text)
        _run([*compiler, *_FLAGS, "-o", str(file), str(Path(temporary) / "step.cpp")])
        content = file.read_bytes()
        with file.open("ab") as end:
            end.write(hashlib.sha256(content).digest())
            end.flush()
            os.fsync(end.fileno())
        os.replace(file, path)


def _is_whole(path: Path) -> bool:
    """Returns whether the file ends with its checksum; loading a truncated one may raise SIGBUS."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return len(content) > 32 and hashlib.sha256(content[:-32]).digest() == content[-32:]


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    library.chunk_elements.restype = integer
    library.chunk_elements.argtypes = ()
    library.step.restype = None
    library.step.argtypes = (pointer, pointer, *[integer] * 3, pointer, pointer)
    return library
