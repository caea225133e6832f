"""An optimizer of a user's, from its description to a resumed run: tests/optimizers/example."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from pytorch_optimizer import AdEMAMix as Published
from typing_extensions import Unpack

from megatron_s3.kernels import cpu
from megatron_s3.optimizers import OPTIMIZERS, ElementwiseOptimizer, register
from megatron_s3.optimizers.arguments import About, Options, Params, Rate, arguments
from megatron_s3.optimizers.description import Description
from megatron_s3.rules.signsgd import signsgd_update
from tests.harness import fresh
from tests.harness.trainer import REPOSITORY, assert_bitwise_equal, tensors, train

EXAMPLE = Path(__file__).parent / "example"


@pytest.fixture(scope="module")
def ademamix() -> Iterator[type[ElementwiseOptimizer]]:
    """The class, which its import registers; no test of another file sees it registered."""
    known = dict(OPTIMIZERS._classes)
    from tests.optimizers.example import ademamix_kernel  # noqa: F401 (gives the rule its kernel)
    from tests.optimizers.example.ademamix import AdEMAMix

    yield AdEMAMix
    OPTIMIZERS._classes.clear()
    OPTIMIZERS._classes.update(known)


def steps(optimizer_of, count: int = 6, numel: int = 257) -> torch.nn.Parameter:
    param = torch.nn.Parameter(torch.linspace(-1, 1, numel))
    optimizer = optimizer_of([param])
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        param.grad = torch.randn(numel, generator=generator)
        optimizer.step()
    param.optimizer = optimizer
    return param


def test_it_is_the_published_one(ademamix) -> None:
    """Within rounding: that divides where the rule multiplies by what it has divided once."""
    ours = steps(lambda p: ademamix(p, lr=1e-2, weight_decay=0.1))
    theirs = steps(
        lambda p: Published(
            p, lr=1e-2, betas=(0.9, 0.999, 0.9999), alpha=5.0, weight_decay=0.1,
            weight_decouple=True, t_alpha_beta3=None, eps=1e-8,
        )
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_its_kernel_gives_the_portable_bits(ademamix) -> None:
    portable = steps(lambda p: ademamix(p, lr=1e-2, fused=False))
    fused = steps(lambda p: ademamix(p, lr=1e-2, fused=True))
    assert fused.optimizer.path == cpu.NAME
    assert torch.equal(portable, fused)


def test_its_gpu_kernel_gives_the_portable_bits() -> None:
    """In Triton's interpreter, on the CPU."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, EXAMPLE / "in_interpreter.py"],
        capture_output=True, text=True, cwd=REPOSITORY,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_hyperparameter_named_momentum_is_what_schedulers_set() -> None:
    def optimizer(momentum: str | None) -> type[ElementwiseOptimizer]:
        class Signum(ElementwiseOptimizer):
            description = Description(
                "signum", "Signum", ("exp_avg",), 1.0, signsgd_update, momentum=momentum
            )

            @arguments
            def __init__(
                self,
                params: Params,
                lr: Rate = 1e-3,
                *,
                momentum: Annotated[float, About("coefficient of the average", 0, 1)] = 0.95,
                **options: Unpack[Options],
            ) -> None: ...

        return Signum

    for named in ("momentum", None):
        param = torch.nn.Parameter(torch.ones(3))
        found = optimizer(named)([param], lr=1e-2)
        schedule = torch.optim.lr_scheduler.CyclicLR(
            found, 1e-3, 1e-2, step_size_up=4, base_momentum=0.5, max_momentum=0.9
        )
        param.grad = torch.ones(3)
        found.step()
        assert found.param_groups[0]["momentum"] == 0.9
        schedule.step()
        assert found.param_groups[0]["momentum"] == pytest.approx(0.8)
    with pytest.raises(TypeError, match="momentum='beta', but its hyperparameters are momentum"):
        optimizer("beta")


def test_a_name_is_given_once(ademamix) -> None:
    with pytest.raises(ValueError, match=r"the name 'ademamix' is taken by .*example.ademamix"):

        @register
        class Other(ElementwiseOptimizer):
            description = Description("ademamix", "x", ("exp_avg",), 1.0, ademamix.description.rule)

    assert OPTIMIZERS["ademamix"] is ademamix
    with pytest.raises(ValueError, match="'AdEMAMix' cannot be the name of an optimizer"):

        @register
        class Named(ElementwiseOptimizer):
            description = Description("AdEMAMix", "x", ("exp_avg",), 1.0, ademamix.description.rule)


def test_a_flag_belongs_to_one_optimizer(ademamix) -> None:
    """Both would have the flag --shared-key-rate."""

    def signature(self, params: Params, *, rate: Annotated[float, About("x")] = 0.5) -> None: ...

    for owner, name in (("shared", "key_rate"), ("shared_key", "rate")):
        cls = of(("exp_avg",), signature)
        h = replace(cls.description.hyperparameters[0], name=name)
        cls.description = replace(cls.description, name=owner, hyperparameters=(h,))
        cls.__qualname__ = owner
        if owner == "shared":
            register(cls)
            continue
        with pytest.raises(
            ValueError, match="shared_key: its shared_key_rate would also be one of"
        ):
            register(cls)
    assert "shared_key" not in OPTIMIZERS._classes


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine with a package that announces the example."""
    info = tmp_path / "site/ademamix-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ademamix\nVersion: 1.0\n")
    module = "tests.optimizers.example.ademamix_kernel"
    (info / "entry_points.txt").write_text(f"[megatron_s3.optimizers]\nademamix = {module}\n")
    return {"PYTHONPATH": os.pathsep.join([str(info.parent), str(REPOSITORY)])}


def megatron_s3(*words: object, environment: dict[str, str]) -> subprocess.CompletedProcess:
    return fresh.run(
        *("-m", "megatron_s3.cli", *words), env=os.environ | environment, cwd=REPOSITORY
    )


def test_a_package_that_cannot_be_imported_is_named(
    installed: dict[str, str], tmp_path: Path
) -> None:
    points = tmp_path / "site/ademamix-1.0.dist-info/entry_points.txt"
    points.write_text(points.read_text().replace("ademamix_kernel", "gone"))
    done = megatron_s3("launch", "tiny-s3", "--dry-run", environment=installed)
    assert done.returncode == 2
    (said,) = done.stderr.splitlines()[-1:]
    assert said.startswith("error: the entry point ademamix = tests.optimizers.example.gone of ")
    assert said.endswith("fix or uninstall ademamix")


@pytest.mark.parametrize(
    ("text", "point", "said"),
    [
        ("import sys; sys.exit()", "module", "SystemExit"),
        ("class Forgotten: pass", "module:Forgotten", "module.Forgotten lacks the decorator"),
    ],
)
def test_a_package_that_registers_nothing_is_named(
    installed: dict[str, str], tmp_path: Path, text: str, point: str, said: str
) -> None:
    (tmp_path / "site/module.py").write_text(text)
    points = tmp_path / "site/ademamix-1.0.dist-info/entry_points.txt"
    points.write_text(f"[megatron_s3.optimizers]\nademamix = {point}\n")
    done = megatron_s3("launch", "tiny-s3", "--dry-run", environment=installed)
    assert done.returncode == 2
    assert f"cannot be loaded ({said}" in done.stderr or f": {said}" in done.stderr
    assert done.stderr.endswith("fix or uninstall ademamix\n")


@pytest.mark.thorough
@pytest.mark.slow
def test_an_installed_package_adds_an_optimizer(installed: dict[str, str], tmp_path: Path) -> None:
    """It trains on 2 ranks with its kernel, resumes bitwise, and has flags and a stamp."""
    flags = ["--bf16", "--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
    flags += ["--optimizer", "ademamix", "--ademamix-alpha", "2", "--save-interval", "3"]
    through, resumed = tmp_path / "through", tmp_path / "resumed"
    run = train(*flags, "--save", through, ranks=2, environment=installed)
    (said,) = (line for line in run.said if line.startswith("AdEMAMix with"))
    assert "alpha=2" in said
    assert "step: C++ kernel on cpu; clip_grad=1" in run.said
    train(
        *flags, "--load", through, "--ckpt-step", 3, "--save", resumed, ranks=2,
        environment=installed,
    )  # fmt: skip
    assert_bitwise_equal(tensors(through), tensors(resumed))
    assert any("exp_avg_slow" in name.split(".") for name in tensors(through))
    wrong = train(*flags, "--ademamix-beta3", 2, ranks=2, environment=installed, check=False)
    assert "--ademamix-beta3 must be in [0, 1), not 2.0" in wrong.error


@pytest.mark.slow
def test_the_launcher_knows_an_installed_optimizer(
    installed: dict[str, str], tmp_path: Path
) -> None:
    words = ["launch", "tiny-s3", "--dry-run", "--run-dir", tmp_path / "run"]
    words += ["--set", "optimizer=ademamix", "--set", "clip_grad=1"]
    done = megatron_s3(*words, environment=installed)
    assert done.returncode == 0, done.stderr
    assert "--optimizer ademamix" in done.stdout
    without = megatron_s3(*words, environment={"PYTHONPATH": str(REPOSITORY)})
    assert without.returncode == 2 and "ademamix" in without.stderr


def of(state: Any, signature: Any = None, rule: Any = signsgd_update) -> type[ElementwiseOptimizer]:
    """Returns an optimizer that is not registered."""
    body = {} if signature is None else {"__init__": arguments(signature)}
    description = Description("signum", "Signum", state, 1.0, rule)
    return type("Signum", (ElementwiseOptimizer,), {"description": description, **body})


def test_the_learning_rate_has_the_default_of_the_signature() -> None:
    def default(self, params: Params, lr: Rate = 0.25, **options: Unpack[Options]) -> None: ...

    def required(self, params: Params, lr: Rate, **options: Unpack[Options]) -> None: ...

    param = torch.nn.Parameter(torch.ones(3))
    assert of(("exp_avg",), default)([param]).param_groups[0]["lr"] == 0.25
    assert of(("exp_avg",), required)([param], 0.5).param_groups[0]["lr"] == 0.5
    with pytest.raises(TypeError, match="has no default for lr"):
        of(("exp_avg",), required)([param])


def test_what_would_be_ignored_in_a_signature_is_an_error() -> None:
    momentum = Annotated[float, About("coefficient of the average", 0, 1)]

    def ignored(self, params: Params, *, momentum: float = 0.9) -> None: ...

    def without(self, params: Params, *, momentum: momentum) -> None: ...

    def outside(self, params: Params, *, momentum: momentum = 1.0) -> None: ...

    def text(self, params: Params, *, momentum: momentum = "0.9") -> None: ...

    def step(self, params: Params, *, step: momentum = 0.9) -> None: ...

    def rate(self, params: Params, lr: momentum = 0.9) -> None: ...

    def decay(self, params: Params, *, weight_decay: momentum = 0.9) -> None: ...

    for signature, words in (
        (ignored, "ignored: momentum would be ignored. Annotate it"),
        (without, "without: the default of momentum must be a number, not None"),
        (outside, r"outside: the default of momentum must be in \[0, 1\), not 1.0"),
        (text, "text: the default of momentum must be a number, not '0.9'"),
        (step, "step: step cannot be a hyperparameter"),
        (rate, "rate: lr cannot be a hyperparameter"),
        (decay, "decay: weight_decay cannot be a hyperparameter"),
    ):
        with pytest.raises(TypeError, match=words):
            arguments(signature)


@pytest.mark.parametrize("state", ["exp_avg", ("exp_avg", "exp_avg"), ("master_param",)])
def test_states_have_different_names(state: Any) -> None:
    with pytest.raises(ValueError, match="Signum: state must be a tuple of different names"):
        of(state)


def test_a_rule_without_state_may_read_the_step() -> None:
    """Exact, also for a parameter that misses a step."""
    cls = of((), rule=lambda grad, t: grad / t)
    cls.group_hyperparameters = lambda self, group: {"t": float(group["step"])}
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizer = cls(params, lr=1.0)
    for missing in (None, 1, None):
        for i, param in enumerate(params):
            param.grad = None if i == missing else torch.ones(3)
        optimizer.step()
    totals = [1 + 1 / 2 + 1 / 3, 1 + 1 / 2]
    for param, total in zip(params, totals, strict=True):
        torch.testing.assert_close(param.detach(), torch.full((3,), -total))
