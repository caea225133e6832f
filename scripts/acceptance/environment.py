"""Driver, packages, GPUs, and whether each GPU computes and reaches the others."""

import importlib.metadata
import os
import platform
import shutil
import subprocess

import torch

from scripts.acceptance.rows import Writer
from scripts.acceptance.task import Task
from scripts.bench.commit import commit

__all__ = ["check", "installed", "sanitizer"]

_PACKAGES = {
    "megatron-core": "Megatron's trainer cannot run",
    "triton": "the kernel cannot run",
    "transformer_engine": "its AdamW and layers are not looked at",
    "apex": "its AdamW is not looked at",
    "matplotlib": "no pictures",
    "pytest": "the test suite cannot run",
}
#: Columns of nvidia-smi: name there, in the table.
_COLUMNS = {
    "driver_version": "driver",
    "memory.total": "memory",
    "clocks.sm": "SM clock",
    "clocks.max.sm": "of at most",
    "clocks.mem": "memory clock",
    "power.limit": "power limit",
    "temperature.gpu": "degrees C",
    "ecc.errors.uncorrected.volatile.total": "uncorrected ECC errors",
}


def check(writer: Writer, task: Task) -> None:
    """Rows of versions and GPUs; a product of matrices and a sum over all GPUs have to be right."""
    system = f"Python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores"
    found = commit()
    changed = {True: ", changed since", False: "", None: ""}[found["changed"]]
    writer.passed("machine", system)
    writer.passed("commit", f"{found['commit']}{changed}", **found)
    writer.passed("torch", f"{torch.__version__}, built for CUDA {torch.version.cuda}")
    for name, without in _PACKAGES.items():
        try:
            writer.passed(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            writer.skipped(name, f"not installed: {without}")
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler:
        writer.passed("C compiler", f"{compiler} (Triton builds its launchers with one)")
    else:
        writer.skipped("C compiler", "none found: Triton may not start, and S3 be slow")
    if found := sanitizer():
        writer.passed("compute-sanitizer", found)
    else:
        writer.skipped("compute-sanitizer", "not on the PATH nor in /usr/local/cuda/bin")
    if task.device == "cpu":
        writer.skipped("GPUs", "a rehearsal on the CPU")
        return
    version = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None
    if version:
        writer.passed(
            "NCCL", ".".join(map(str, version)) if isinstance(version, tuple) else version
        )
    else:
        writer.failed("NCCL", "this torch has none, and Megatron needs it on GPUs")
    count = torch.cuda.device_count()
    for index in range(count):
        _gpu(writer, index)
    if others := _said(
        "nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader"
    ):
        lines = [line for line in others.splitlines() if not line.startswith(f"{os.getpid()},")]
        if lines:
            writer.passed("others on the GPUs", f"{len(lines)} processes: timings may suffer")


def _gpu(writer: Writer, index: int) -> None:
    properties = torch.cuda.get_device_properties(index)
    text = [
        f"compute capability {properties.major}.{properties.minor}",
        f"{properties.multi_processor_count} multiprocessors",
    ]
    query = ",".join(_COLUMNS)
    # By UUID, since CUDA_VISIBLE_DEVICES numbers anew.
    uuid = f"GPU-{properties.uuid}" if hasattr(properties, "uuid") else str(index)
    said = _said("nvidia-smi", "-i", uuid, f"--query-gpu={query}", "--format=csv,noheader")
    values = [value.strip() for value in said.split(",")] if said else []
    figures = dict(zip(_COLUMNS, values, strict=False))
    text += [f"{_COLUMNS[name]} {value}" for name, value in figures.items()]
    name = f"GPU {index}: {properties.name}"
    if properties.major < 8:
        writer.failed(name, "compute capability 8.0 or later is needed; " + ", ".join(text))
        return
    device = torch.device("cuda", index)
    # Exact in any precision: every product is 1, every sum at most 4096.
    ones = torch.ones(4096, 4096, dtype=torch.bfloat16, device=device)
    right = bool(((ones @ ones) == 4096).all())
    (writer.passed if right else writer.failed)(
        name, ", ".join(text) if right else "multiplies wrongly", **figures
    )
    if index == 0:
        return
    there = torch.arange(1 << 20, device="cuda:0").to(device)
    if not torch.equal(there.cpu(), torch.arange(1 << 20)):
        writer.failed(
            f"copy from GPU 0 to GPU {index}", "arrives changed (is an IOMMU in the way?)"
        )


def sanitizer() -> str | None:
    """The path of compute-sanitizer, if there is one."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")


def _said(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def installed(name: str) -> bool:
    """Whether a distribution is."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
