"""A pytest plugin: each test of Megatron-LM's on ranks of its own, with S3 in Adam's place.

Loaded by ``python -m tests.upstream`` (``-p``), which sets ``UPSTREAM_TESTS`` to a JSON
object: ``ranks``, ``optimizer``, ``results`` (a file of JSON lines, one a test), ``logs`` (a
folder), ``timeout`` (seconds a test), ``only`` (ids of tests, or null for all) and ``tree``.

A rank is a fork of the pytest process, which has imported everything and started nothing: a test
leaves no process group, thread or setting to the next, and one that hangs is killed.  Where there
is no GPU the ranks take the CPU with gloo.
"""

import contextlib
import copy
import ctypes
import importlib
import importlib.util
import inspect
import json
import os
import runpy
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
# By its path: the package `tests` is upstream's here.
free_port = runpy.run_path(str(HERE.parent / "harness/ports.py"))["free_port"]
#: After a rank has failed, its peers wait for it in vain: seconds until they are killed.
GRACE = 10.0

_settings: dict[str, Any] = {}
_done: set[str] = set()


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Prepares Megatron, before upstream's conftest.py imports it."""
    _settings.update(json.loads(os.environ["UPSTREAM_TESTS"]))
    results = Path(_settings["results"])
    if results.exists():
        _done.update(json.loads(line)["test"] for line in results.read_text().splitlines())
    os.environ["LOCAL_WORLD_SIZE"] = str(_settings["ranks"])
    sys.argv = ["pytest"]  # upstream's helpers parse it as Megatron's arguments
    import megatron_s3

    megatron_s3.register()
    _take_gloo_for_nccl()
    _take_local_layers()
    _replace_adam(_settings["optimizer"])
    _note_optimizers()
    _stay_offline()
    _fill_states()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what the file of results has already, and what was not asked for."""
    only = _settings.get("only")
    items[:] = [
        item for item in items if item.nodeid not in _done and (only is None or item.nodeid in only)
    ]


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    """Lets a file be imported that imports Transformer Engine for the sake of some of its tests."""
    report = yield
    if (
        report.outcome != "failed"
        or "No module named 'transformer_engine'" not in report.longreprtext
    ):
        return report
    names = ("", ".pytorch", ".pytorch.fp8", ".pytorch.optimizers")
    missing = {f"transformer_engine{name}": types.ModuleType("missing") for name in names}
    missing["transformer_engine.pytorch.fp8"].fp8_autocast = None
    missing["transformer_engine.pytorch.optimizers"].FusedAdam = None
    sys.modules.update(missing)
    try:
        from _pytest.runner import pytest_make_collect_report as again

        return again(collector)
    finally:
        for name in missing:
            del sys.modules[name]


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be imported, or skips itself, is a result too."""
    if report.outcome == "passed" or report.nodeid in _done:
        return
    error, at = _first_line(report)
    _write(
        {"test": report.nodeid, "outcome": report.outcome, "error": error, "at": at}
        | {"seconds": 0.0, "optimizers": [], "steps": {}}
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool:
    """Runs the test on ranks of its own, and writes down how it ended."""
    folder = Path(tempfile.mkdtemp(prefix="upstream-"))
    started = time.monotonic()
    try:
        killed = _run(item, folder)
        reports = [_read(folder / f"{rank}.jsonl") for rank in range(_settings["ranks"])]
        result = {"test": item.nodeid, "seconds": round(time.monotonic() - started, 1)}
        _write(result | merge(reports, killed))
        if _result_of_last["outcome"] == "failed":
            name = item.nodeid.rpartition("/")[2].replace("/", "_")[:150]
            log = Path(_settings["logs"]) / _settings["optimizer"] / f"{name}.txt"
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(_log(folder, reports))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return True


def merge(reports: list[list[dict[str, Any]]], killed: str | None) -> dict[str, Any]:
    """How a test ended, from what its ranks reported of its phases.

    Args:
        reports: of every rank, of every phase that ended: ``when``, ``outcome``, ``time``,
            ``error``, ``at``, ``optimizers``, ``steps``.
        killed: why ranks were killed, if any were.

    Returns:
        ``outcome`` (passed, failed or skipped), ``error`` and ``at`` (of the rank that failed
        first: its peers fail of its absence), ``optimizers`` and ``steps`` (of all ranks).
    """
    every = [report for rank in reports for report in rank]
    failed = sorted((r for r in every if r["outcome"] == "failed"), key=lambda r: r["time"])
    skipped = [r for r in every if r["outcome"] == "skipped"]
    unfinished = sum(not rank or rank[-1]["when"] != "teardown" for rank in reports)
    first = {"error": "", "at": ""}
    if failed:
        outcome, first = "failed", failed[0]
    elif killed or unfinished:
        outcome = "failed"
        first = {"error": killed or f"{unfinished} ranks died without a report", "at": ""}
    elif len(skipped) == len(reports):
        outcome, first = "skipped", skipped[0]
    else:
        outcome = "passed"
    steps: Counter[str] = Counter()
    for report in every:
        for name, count in report.get("steps", {}).items():
            steps[name] = max(steps[name], count)
    return {
        "outcome": outcome,
        "error": first["error"],
        "at": first["at"],
        "optimizers": sorted({name for r in every for name in r.get("optimizers", ())}),
        "steps": dict(sorted(steps.items())),
    }


_result_of_last: dict[str, Any] = {}


def _write(result: dict[str, Any]) -> None:
    _result_of_last.clear()
    _result_of_last.update(result)
    with open(_settings["results"], "a") as file:
        file.write(json.dumps(result) + "\n")
    print(f"{result['outcome']:8}{result['seconds']:7.1f} s  {result['test']}", flush=True)
    if result["error"]:
        print(f"    {result['error'][:200]}", flush=True)


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _log(folder: Path, reports: list[list[dict[str, Any]]]) -> str:
    """The first failed rank's traceback, then what the ranks printed last."""
    failed = [r for rank in reports for r in rank if r["outcome"] == "failed"]
    first = min(failed, key=lambda r: r["time"], default={}).get("traceback", "")
    ends = [
        f"--- rank {file.stem}\n{file.read_text(errors='replace')[-3000:]}"
        for file in sorted(folder.glob("*.log"))
    ]
    return "\n".join([first, *ends])


def _run(item: pytest.Item, folder: Path) -> str | None:
    """Forks the ranks and waits; returns why some had to be killed, or None."""
    port = free_port()
    ranks = _settings["ranks"]
    running = {_start(item, folder, rank, port): rank for rank in range(ranks)}
    groups = list(running)
    deadline = time.monotonic() + _settings["timeout"]
    reason = f"not finished after {_settings['timeout']} s"
    while running and time.monotonic() < deadline:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            time.sleep(0.02)
        elif pid in running:
            del running[pid]
            if status:
                early = time.monotonic() + GRACE
                if early < deadline:
                    deadline, reason = early, "waited for a rank that had failed"
    for group in groups:  # and what the ranks have left behind
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    for pid in running:
        os.waitpid(pid, 0)
    return reason if running else None


def _start(item: pytest.Item, folder: Path, rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not without its parent
        log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(_settings["ranks"]),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
        utilities = sys.modules.get("tests.unit_tests.test_utilities")
        if utilities is not None:  # what it read when it was imported
            utilities.Utils.rank, utilities.Utils.world_size = rank, _settings["ranks"]
            if "dist_checkpointing" in item.nodeid:  # some count on an earlier test's group
                utilities.Utils.initialize_distributed()
        # A folder for each rank and one for all above them, as where torchrun starts pytest.
        item.config._tmp_path_factory._basetemp = folder / f"rank{rank}"
        (folder / f"rank{rank}").mkdir()
        _here.file = folder / f"{rank}.jsonl"
        from _pytest.runner import runtestprotocol

        runtestprotocol(item, log=False, nextitem=None)
        status = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


#: In a rank: where it reports, and what it has built.
_here = types.SimpleNamespace(file=None, parts=[], others=[], replaced=set(), steps=Counter())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    """Writes each phase down as it ends; after a failure the rank ends too."""
    report = yield
    error, at = _first_line(report) if report.outcome != "passed" else ("", "")
    if report.outcome == "failed" and call.excinfo is not None:
        error = call.excinfo.exconly().strip().splitlines()[0]
    line = {
        "when": report.when,
        "outcome": report.outcome,
        "time": call.stop,
        "error": error,
        "at": at,
        "traceback": report.longreprtext if report.outcome == "failed" else "",
        "optimizers": _built(),
        "steps": dict(_here.steps),
    }
    with open(_here.file, "a") as file:
        file.write(json.dumps(line) + "\n")
    if report.outcome == "failed":
        sys.stdout.flush()
        os._exit(1)  # the peers notice at once
    return report


def _first_line(report: Any) -> tuple[str, str]:
    """What a report says went wrong, and where: file:line."""
    longrepr = report.longrepr
    if isinstance(longrepr, tuple):  # skipped
        file, line, reason = longrepr
        return reason.removeprefix("Skipped: ").strip().splitlines()[0], f"{_short(file)}:{line}"
    crash = getattr(longrepr, "reprcrash", None)
    if crash is not None:
        return crash.message.splitlines()[0], f"{_short(crash.path)}:{crash.lineno}"
    lines = [line for line in str(longrepr).splitlines() if line.startswith("E ")]
    return (lines or str(longrepr).splitlines() or [""])[-1].removeprefix("E").strip(), ""


def _short(file: str) -> str:
    """Without the folders that are this machine's."""
    for folder in (sysconfig.get_path("purelib"), _settings["tree"], str(HERE.parents[1])):
        file = file.removeprefix(f"{folder}/")
    return file.removeprefix(f"{Path(sysconfig.get_path('stdlib')).parent}/")


def _name(kind: type) -> str:
    return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"


def _built() -> list[str]:
    """Every optimizer of Megatron's with the torch optimizer in it; every other torch optimizer."""
    pairs = [(part, getattr(part, "optimizer", None)) for part in _here.parts]
    inner = {id(optimizer) for _, optimizer in pairs}
    names = {
        f"{type(part).__name__}({_name(type(optimizer))})"
        for part, optimizer in pairs
        if isinstance(optimizer, torch.optim.Optimizer)
    }
    return sorted(
        names
        | {
            _name(type(o))
            for o in _here.others
            if id(o) not in inner and id(o) not in _here.replaced
        }
    )


def _note_optimizers() -> None:
    """Keeps every optimizer that a test builds, and counts steps."""
    from megatron_s3.mcore.build import MegatronOptimizer

    _after_init(MegatronOptimizer, lambda self: _here.parts.append(self))
    _after_init(torch.optim.Optimizer, lambda self: _here.others.append(self))

    def count(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        _here.steps[_name(type(optimizer))] += 1

    sys.modules[torch.optim.Optimizer.__module__].register_optimizer_step_post_hook(count)


def _after_init(cls: type, action: Any) -> None:
    original = cls.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        action(self)

    cls.__init__ = __init__


def _replace_adam(name: str) -> None:
    """Makes ``OptimizerConfig(optimizer="adam")`` one of another optimizer's."""
    from megatron_s3.mcore import build

    config = importlib.import_module("megatron.core.optimizer").OptimizerConfig
    exchange = build._exchange

    def replace(self: Any) -> None:
        if self.optimizer == "adam":
            self.optimizer = name
            if name == "adam" and self.lr is None:
                self.lr = 1e-3  # torch's AdamW takes numbers alone, the others' None

    def exchange_and_init(part: Any, *args: Any) -> None:
        _here.replaced.add(id(part.optimizer))
        exchange(part, *args)
        # Or helpers that find no state put Adam's there, by name.
        part.optimizer.init_state()

    _after_init(config, replace)
    build._exchange = exchange_and_init


def _take_gloo_for_nccl() -> None:
    if torch.distributed.is_nccl_available() and not _on_cpu():
        return
    for name in ("init_process_group", "new_group"):
        original = getattr(torch.distributed, name)

        def start(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            args = tuple("gloo" if isinstance(a, str) and "nccl" in a else a for a in args)
            if "nccl" in str(kwargs.get("backend")):
                kwargs["backend"] = "gloo"
            kwargs.pop("device_id", None)
            return _original(*args, **kwargs)

        setattr(torch.distributed, name, start)
        setattr(torch.distributed.distributed_c10d, name, start)


def _take_local_layers() -> None:
    """Megatron's own layers for Transformer Engine's where it is missing: the same parameters."""
    specs = importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    if specs.HAVE_TE:
        return
    block, local = specs.get_gpt_decoder_block_spec, specs.get_gpt_layer_local_submodules
    known = inspect.signature(local).parameters

    def layer(*args: Any, **kwargs: Any) -> Any:
        return local(*args, **{name: value for name, value in kwargs.items() if name in known})

    def of_block(config: Any, use_transformer_engine: bool, *args: Any, **kwargs: Any) -> Any:
        return block(config, False, *args, **kwargs)

    specs.get_gpt_layer_with_transformer_engine_submodules = layer
    specs.get_gpt_decoder_block_spec = of_block
    norm = importlib.import_module("megatron.core.transformer.torch_norm").WrappedTorchNorm
    new = norm.__new__

    def build(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        # torch's refuses sequence parallelism, whose only trace in a norm is this attribute.
        plain = copy.copy(config)
        plain.sequence_parallel = False
        built = new(cls, plain, *args, **kwargs)
        for param in built.parameters():
            param.sequence_parallel = config.sequence_parallel
        return built

    norm.__new__ = build


def _on_cpu() -> bool:
    from megatron_s3.mcore import cpu_device

    return cpu_device.active()


def _stay_offline() -> None:
    """Upstream's fixtures download data for other tests into /opt."""
    name = "tests.test_utils.python_scripts.download_unit_tests_dataset"
    module = types.ModuleType(name)
    module.download_and_extract_asset = lambda **kwargs: False
    sys.modules[name] = module


def _fill_states() -> None:
    """Random states, alike on all ranks, where upstream's helpers leave zeros.

    With zeros "saved equals loaded" would hold for an optimizer that loses its state, too.
    """
    utils = "tests.unit_tests.dist_checkpointing.utils"
    try:
        found = importlib.util.find_spec(utils) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        return
    module = importlib.import_module(utils)
    package = sys.modules[utils.rpartition(".")[0]]
    for name in ("setup_model_and_optimizer", "setup_moe_model_and_optimizer"):
        original = getattr(module, name)

        def setup(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            model, optimizer = _original(*args, **kwargs)
            _here.filled = getattr(_here, "filled", 0) + 1
            _fill(optimizer, torch.Generator().manual_seed(_here.filled))
            return model, optimizer

        setattr(module, name, setup)
        setattr(package, name, setup)


@torch.no_grad()
def _fill(optimizer: Any, generator: torch.Generator) -> None:
    parts = getattr(optimizer, "chained_optimizers", None)
    if parts is not None:
        for part in parts:
            _fill(part, generator)
        return
    inner = getattr(optimizer, "optimizer", None)
    if not isinstance(inner, torch.optim.Optimizer):
        return
    for group in inner.param_groups:
        for param in group["params"]:
            for name, value in inner.state[param].items():
                if name != "master_param" and torch.is_tensor(value) and value.dim():
                    value = getattr(value, "_local_tensor", value)  # a DTensor's
                    value.copy_(torch.rand(value.shape, generator=generator, device="cpu"))
