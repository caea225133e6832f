"""A pytest plugin: each test of Megatron-LM's on ranks of its own, with S3 in Adam's place.

Loaded by ``python -m tests.upstream`` (``-p``), which sets ``UPSTREAM_TESTS`` to a JSON
object: ``ranks``, ``optimizer``, ``results`` (a file of JSON lines, one a test), ``logs`` (a
folder), ``timeout`` (seconds a test), ``only`` (ids of tests, or null for all) and ``tree``.

A rank is a fork of the pytest process, which has imported everything and started nothing: a test
leaves no process group, thread or setting to the next, and one that hangs is killed.  Where there
is no GPU the ranks take the CPU with gloo.
"""

import json
import os
import shutil
import sys
import sysconfig
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import pytest
from harness.forks import TIMED_OUT, fork, wait
from upstream import stand_ins
from upstream.reports import log, merge, read

ROOT = Path(__file__).resolve().parents[2]
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

    megatron_s3.register("auto")
    stand_ins.put(_settings["optimizer"])


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
        reports = [read(folder / f"{rank}.jsonl") for rank in range(_settings["ranks"])]
        result = {"test": item.nodeid, "seconds": round(time.monotonic() - started, 1)}
        result |= merge(reports, killed)
        _write(result)
        if result["outcome"] == "failed":
            name = item.nodeid.rpartition("/")[2].replace("/", "_")[:150]
            file = Path(_settings["logs"]) / _settings["optimizer"] / f"{name}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(log(folder, reports))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return True


def _write(result: dict[str, Any]) -> None:
    with open(_settings["results"], "a") as file:
        file.write(json.dumps(result) + "\n")
    print(f"{result['outcome']:8}{result['seconds']:7.1f} s  {result['test']}", flush=True)
    if result["error"]:
        print(f"    {result['error'][:200]}", flush=True)


def _run(item: pytest.Item, folder: Path) -> str | None:
    """Forks the ranks and waits; returns why some had to be killed, or None."""
    logs = [folder / f"{rank}.log" for rank in range(_settings["ranks"])]
    ended = wait(fork(lambda: _in_rank(item, folder), logs), _settings["timeout"], GRACE)
    if ended.status == TIMED_OUT:
        return f"not finished after {_settings['timeout']} s"
    return "waited for a rank that had failed" if ended.killed else None


def _in_rank(item: pytest.Item, folder: Path) -> None:
    rank = int(os.environ["RANK"])
    utilities = sys.modules.get("tests.unit_tests.test_utilities")
    if utilities is not None:  # what it read when it was imported
        utilities.Utils.rank, utilities.Utils.world_size = rank, _settings["ranks"]
        if "dist_checkpointing" in item.nodeid:  # some count on an earlier test's group
            utilities.Utils.initialize_distributed()
    # A folder for each rank and one for all above them, as where torchrun starts pytest.
    item.config._tmp_path_factory._basetemp = folder / f"rank{rank}"
    (folder / f"rank{rank}").mkdir()
    _settings["report"] = folder / f"{rank}.jsonl"
    from _pytest.runner import runtestprotocol

    runtestprotocol(item, log=False, nextitem=None)


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
        "optimizers": stand_ins.built(),
        "steps": dict(stand_ins.steps),
    }
    with open(_settings["report"], "a") as file:
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
    for folder in (sysconfig.get_path("purelib"), _settings["tree"], str(ROOT)):
        file = file.removeprefix(f"{folder}/")
    return file.removeprefix(f"{Path(sysconfig.get_path('stdlib')).parent}/")
