#!/usr/bin/env python3
"""PyTorch's own tests of optimizers and schedulers, with S3 and its siblings in their place.

    python -m tests.upstream.torch_tests TESTS [-k PATTERN] [--output FILE]

TESTS is the folder ``test`` of a checkout of PyTorch, best of the installed release; it is read and
not written to.  ``test_optim.py`` has its tests made from torch's list of optimizers
(``torch.testing._internal.common_optimizers``), which here is the plugin's; those of
``optim/test_lrscheduler.py`` run once for each optimizer of the plugin, in SGD's and in Adam's
place.

The report tells how every test ended, alike ones in one line.  Exit status 1: a test failed, and
``EXPLAINED`` does not say why.

Needs expecttest, as torch's tests do.
"""

import argparse
import contextlib
import importlib
import io
import re
import sys
import time
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_s3.optimizers import OPTIMIZERS

#: Why a test cannot pass: pattern of its name (``rule.test``) and of what it said, reason.
EXPLAINED: tuple[tuple[str, str, str], ...] = (
    (
        r"\.test_complex(_2d)?_",
        r"updates floating-point parameters, not torch\.complex64",
        "complex parameters are refused: S3 divides by a norm of single real elements",
    ),
    (
        r"\.test_fused_error_on_params_on_meta_",
        r"does not match \"fused=True, but .*No parameter was changed",
        "what fused=True cannot take is refused in the plugin's own words",
    ),
    (
        r"^(sgdm|signsgd)\.test_cycle_lr_with_momentumless_optimizer",
        r"None mismatch",
        "the test takes Adam for an optimizer without a momentum; these have one",
    ),
    (
        r"\.test_lr_scheduler_verbose_deprecation_warning_",
        r"unexpected keyword argument 'verbose'",
        "a test of an older torch: this one's schedulers have no verbose",
    ),
)


def main(argv: list[str] | None = None) -> int:
    """Runs and reports; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tests", type=Path, help="the folder test of a checkout of PyTorch")
    parser.add_argument("-k", metavar="PATTERN", default="", help="only tests with this in them")
    parser.add_argument("--output", type=Path, help="where the report goes, beside stdout")
    args = parser.parse_args(argv)
    for name in ("test_optim.py", "optim/test_lrscheduler.py"):
        if not (args.tests / name).is_file():
            parser.error(f"{args.tests} has no {name}: name the folder test of a PyTorch checkout")
    sys.path.insert(0, str(args.tests.resolve()))
    results: list[tuple[str, str, str]] = []
    begin = time.monotonic()
    for name, case in cases(args.k):
        results.append((name, *ended(case)))
        if len(results) % 100 == 0:
            print(f"{len(results)} tests, {time.monotonic() - begin:.0f} s", file=sys.stderr)
    text, failed = report(results)
    print(text, end="")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text)
    return int(failed or not results)


def cases(pattern: str) -> Iterator[tuple[str, unittest.TestCase]]:
    """Each test that is to run, under the name ``rule.test``."""
    common = importlib.import_module("torch.testing._internal.common_optimizers")
    common.optim_db[:] = [information(common, name, cls) for name, cls in OPTIMIZERS.items()]
    rules = {cls.__name__: name for name, cls in OPTIMIZERS.items()}
    module = importlib.import_module("test_optim")
    for case in unittest.TestLoader().loadTestsFromTestCase(module.TestOptimRenewedCPU):
        test = case._testMethodName
        rule = next((rules[word] for word in test.split("_") if word in rules), "any")
        if pattern in f"{rule}.{test}":
            yield f"{rule}.{test}", case
    module = importlib.import_module("optim.test_lrscheduler")
    for rule, cls in OPTIMIZERS.items():
        for case in unittest.TestLoader().loadTestsFromTestCase(module.TestLRScheduler):
            name = f"{rule}.{case._testMethodName}"
            if pattern in name:
                module.SGD = module.Adam = cls
                yield name, case


def information(common: Any, name: str, cls: type[torch.optim.Optimizer]) -> Any:
    """Returns what torch's tests are to know of an optimizer of the plugin."""
    switches = [h for h in cls.description.hyperparameters if h.is_switch]
    more = [{h.name: not h.default} for h in switches]
    if name == "s3":
        more += [{"p": 1.0}, {"p": 2}, {"beta2": 0.99}, {"grad_bound": 2.0}]

    def inputs(device: Any, dtype: Any = None) -> list[Any]:
        settings = [{}, {"lr": 0.01}, {"weight_decay": 0.1}, {"lr": torch.tensor(0.001)}, *more]
        return [common.OptimizerInput(None, dict(words), str(words)) for words in settings]

    def errors(device: Any, dtype: Any) -> list[Any]:
        wrong = [("lr", -1.0), ("weight_decay", -1.0)]
        wrong += [(h.name, "x") for h in cls.description.hyperparameters]
        return common.get_error_inputs_for_all_optims(device, dtype) + [
            common.ErrorOptimizerInput(
                common.OptimizerInput(None, {key: value}, f"{key}={value}"),
                error_type=ValueError,
                error_regex=key,
            )
            for key, value in wrong
        ]

    return common.OptimizerInfo(
        cls,
        optim_inputs_func=inputs,
        optim_error_inputs_func=errors,
        supported_impls=("fused",),
        supports_fused_on=("cpu", "cuda"),
    )


def ended(case: unittest.TestCase) -> tuple[str, str]:
    """Returns how a test ended (passed, skipped, failed), and what it said."""
    torch.manual_seed(0)
    result = unittest.TestResult()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        case.run(result)
    for what, found in (("failed", result.errors + result.failures), ("skipped", result.skipped)):
        if found:
            lines = [line for line in found[0][1].splitlines() if line.strip()]
            said = [line for line in lines if re.match(r"\w[\w.]*(Error|Exception)\b", line)]
            return what, (said or lines[-1:])[-1]
    return "passed", ""


def report(results: list[tuple[str, str, str]]) -> tuple[str, bool]:
    """The table of all results (name, end, what was said), and whether one failed unexplained."""
    rows: dict[str, dict[str, int]] = {}
    blocks: dict[str, dict[str, list[str]]] = {"failed": {}, "explained": {}}
    for name, end, said in results:
        if end == "failed":
            for pattern, text, why in EXPLAINED:
                if re.search(pattern, name) and re.search(text, said):
                    end, said = "explained", why
                    break
        row = rows.setdefault(name.partition(".")[0], {})
        row[end] = row.get(end, 0) + 1
        if end in blocks:
            blocks[end].setdefault(said, []).append(name)
    ends = ("passed", "failed", "explained", "skipped")
    lines = [f"torch {torch.__version__}", "", f"{'':10s}" + "".join(f"{end:>11s}" for end in ends)]
    total = {end: sum(row.get(end, 0) for row in rows.values()) for end in ends}
    for rule, row in [*rows.items(), ("all", total)]:
        lines.append(f"{rule:10s}" + "".join(f"{row.get(end, 0):11d}" for end in ends))
    for end, found in blocks.items():
        for said, names in found.items():
            lines += ["", f"{end}, {len(names)}: {said[:300]}"]
            lines += [f"    {name}" for name in names]
    return "\n".join(lines) + "\n", bool(blocks["failed"])


if __name__ == "__main__":
    sys.exit(main())
