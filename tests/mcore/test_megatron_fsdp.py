"""Megatron-FSDP: the same bits as plain data parallelism, checkpoints, telemetry, refusals."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_s3.telemetry.runlog import read
from tests.harness.releases import INSTALLED, RELEASES, unpacked
from tests.harness.trainer import (
    ITERATIONS,
    PARAMETERS,
    assert_bitwise_equal,
    brief,
    tensors,
    train,
)

pytestmark = pytest.mark.slow

S3 = ("--optimizer", "s3")
FSDP = ("--use-megatron-fsdp", "--use-distributed-optimizer", "--ckpt-format", "fsdp_dtensor")
SHARDED = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")
STRATEGY = "--data-parallel-sharding-strategy"
WHOLE = (*FSDP, STRATEGY, "optim_grads_params")
# One micro-batch a step: the strategies that shard gradients reduce those of each, the others and
# plain data parallelism their sum.
ONE_BATCH = ("--micro-batch-size", "2")
# As in plain data parallelism; its own default is the model's dtype.
FP32_GRADS = ("--megatron-fsdp-main-grads-dtype", "fp32")
PRECISIONS = {"fp32": (), "bf16": ("--bf16",)}
CASES = {f"{s} {p}": (STRATEGY, s, *PRECISIONS[p]) for s in STRATEGIES for p in PRECISIONS}
SAVE = ("--save-interval", "3")


def of_fsdp(checkpoint: Path, iteration: int = ITERATIONS) -> dict[str, torch.Tensor]:
    """Its parameters (main ones) and states, by ``state/parameter``."""
    found = {}
    for name, tensor in tensors(checkpoint, iteration).items():
        if match := re.fullmatch(r"model\.(?:module\.)+(.+)", name):
            found[f"param/{match[1]}"] = tensor
        elif match := re.fullmatch(r"optimizer\.state\.(?:module\.)+(.+)\.(\w+)", name):
            found[f"{match[2]}/{match[1]}"] = tensor
    return found


def of_data_parallel(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The same of a ``torch_dist`` checkpoint, fully reshardable."""
    names = {
        "self_attention.linear_qkv.layer_norm": "input_layernorm.",
        "mlp.linear_fc1.layer_norm": "pre_mlp_layernorm.",
    }
    found = {}
    for name, tensor in tensors(checkpoint).items():
        match = re.fullmatch(r"optimizer\.state\.(\w+)\.(.+)", name)
        if match is None:
            continue
        state, param = match.groups()
        for here, there in names.items():
            param = param.replace(f"{here}_", there)
        if param.startswith("decoder.layers."):  # all layers are one tensor there
            for i, layer in enumerate(tensor):
                found[f"{state}/{param.replace('layers.', f'layers.{i}.')}"] = layer
        else:
            found[f"{state}/{param}"] = tensor
    return found


def steps(checkpoint: Path, iteration: int = ITERATIONS) -> set[int]:
    """What the optimizer's param groups have counted."""
    reader = dcp.FileSystemReader(checkpoint / f"iter_{iteration:07d}")
    names = reader.read_metadata().state_dict_metadata
    found = {name: None for name in names if re.fullmatch(r"optimizer\..+\.step", name)}
    dcp.load(found, storage_reader=reader, no_dist=True)
    return set(found.values())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What plain data parallelism ends with, by the flags."""
    done = {}

    def ran(*flags: str) -> tuple[dict[str, torch.Tensor], dict[int, str]]:
        if flags not in done:
            folder = tmp_path_factory.mktemp("plain")
            run = train(*SHARDED, *flags, "--save", folder, "--save-interval", "6", ranks=2)
            done[flags] = of_data_parallel(folder), run.losses
        return done[flags]

    return ran


@pytest.mark.parametrize("case", brief(CASES, "optim_grads_params bf16"))
def test_the_same_bits_as_data_parallel(case: str, plain, tmp_path) -> None:
    """Bitwise after 6 steps: losses, main parameters and both states."""
    precision = PRECISIONS[case.split()[1]]
    flags = (*S3, *FSDP, *CASES[case], *ONE_BATCH, *FP32_GRADS)
    run = train(*flags, "--save", tmp_path, "--save-interval", "6", ranks=2)
    expected, losses = plain(*S3, *precision, *ONE_BATCH)
    assert len(expected) == 3 * 28
    assert_bitwise_equal(of_fsdp(tmp_path), expected)
    assert run.losses == losses
    assert f"sharded by Megatron-FSDP ({case.split()[0]})" in run.built
    assert "C++ kernel on cpu" in run.built
    assert not any("is updated by torch operations" in line for line in run.said)


@pytest.mark.parametrize("case", brief(CASES, "optim_grads_params bf16"))
def test_resumes_bitwise(case: str, tmp_path) -> None:
    """Bitwise: every tensor that an unbroken and a resumed run end with, random numbers too."""
    flags = (*S3, *FSDP, *CASES[case], *SAVE)
    through, resumed = tmp_path / "through", tmp_path / "resumed"
    one = train(*flags, "--save", through, ranks=2)
    two = train(*flags, "--load", through, "--ckpt-step", "3", "--save", resumed, ranks=2)
    saved = tensors(through)
    assert {name.split("/")[0] for name in of_fsdp(through)} == {"param", "exp_avg", "exp_pnorm"}
    assert_bitwise_equal(saved, tensors(resumed))
    assert steps(through) == steps(resumed) == {ITERATIONS}
    assert {i: one.losses[i] for i in (4, 6)} == two.losses


AWARE = ("--bf16", "--use-precision-aware-optimizer")
SAME = {
    # name: flags of two runs.
    "without the kernel, optim_grads_params": (("--bf16",), ("--bf16", "--plugin-no-fused")),
    "without the kernel, no_shard": (
        ("--bf16", STRATEGY, "no_shard"),
        ("--bf16", STRATEGY, "no_shard", "--plugin-no-fused"),
    ),
    "precision-aware, bf16 gradients": (("--bf16",), AWARE),
    "precision-aware, fp32 gradients": (("--bf16", *FP32_GRADS), (*AWARE, *FP32_GRADS)),
}


@pytest.mark.thorough
@pytest.mark.parametrize("case", SAME)
def test_the_same_bits_in_another_way(case: str, tmp_path) -> None:
    """Bitwise: losses, main parameters and both states."""
    runs = [
        train(*S3, *WHOLE, *flags, "--save", tmp_path / str(i), "--save-interval", "6", ranks=2)
        for i, flags in enumerate(SAME[case])
    ]
    assert runs[0].losses == runs[1].losses
    assert_bitwise_equal(of_fsdp(tmp_path / "0"), of_fsdp(tmp_path / "1"))
    said = " ".join(runs[1].said)
    assert ("torch operations on cpu (--plugin-no-fused)" in said) == (
        "--plugin-no-fused" in SAME[case][1]
    )


@pytest.mark.thorough
@pytest.mark.parametrize("first", ["bf16", "fp8"])
def test_low_precision_states_resume_bitwise(first: str, tmp_path) -> None:
    """Also exp_avg in int8, of which the checkpoint holds values in bf16."""
    states = ("--exp-avg-dtype", first, "--exp-avg-sq-dtype", "bf16")
    flags = (*S3, *WHOLE, *AWARE, *states, "--clip-grad", "1.0", *SAVE)
    through, resumed = tmp_path / "through", tmp_path / "resumed"
    one = train(*flags, "--save", through, ranks=2)
    two = train(*flags, "--load", through, "--ckpt-step", "3", "--save", resumed, ranks=2)
    saved = of_fsdp(through)
    assert {t.dtype for n, t in saved.items() if n.startswith("param")} == {torch.float32}
    assert {t.dtype for n, t in saved.items() if n.startswith("exp")} == {torch.bfloat16}
    assert_bitwise_equal(saved, of_fsdp(resumed))
    assert {i: one.losses[i] for i in (4, 6)} == two.losses


#: Everything is loaded and saved again without a step.
AT_ONCE = (
    *("--train-iters", "3", "--lr-decay-iters", "6", "--override-opt_param-scheduler"),
    *("--save-interval", "2"),
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Of S3 on 2 ranks after 3 steps and 6."""
    folder = tmp_path_factory.mktemp("saved")
    train(*S3, *WHOLE, "--bf16", *SAVE, "--save", folder, ranks=2)
    return folder


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.thorough), 4])
def test_another_number_of_ranks_loads_bitwise(ranks: int, saved, tmp_path) -> None:
    """Bitwise: main parameters and both states."""
    load = ("--load", saved, "--ckpt-step", "3", *AT_ONCE, "--save", tmp_path)
    train(*S3, *WHOLE, "--bf16", *load, ranks=ranks)
    assert_bitwise_equal(of_fsdp(saved, 3), of_fsdp(tmp_path, 3))


@pytest.mark.thorough
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_strategy_loads_bitwise(strategy: str, saved, tmp_path) -> None:
    load = ("--load", saved, "--ckpt-step", "3", *AT_ONCE, "--save", tmp_path)
    train(*S3, *FSDP, STRATEGY, strategy, "--bf16", *load, ranks=2)
    assert_bitwise_equal(of_fsdp(saved, 3), of_fsdp(tmp_path, 3))


@pytest.mark.thorough
def test_weights_alone(saved, tmp_path) -> None:
    """Bitwise: main parameters, and the next loss, which is the model's; the state begins anew."""
    load = ("--load", saved, "--ckpt-step", "3", "--no-load-optim", "--save", tmp_path)
    train(*S3, *WHOLE, "--bf16", *load, *AT_ONCE, ranks=2)
    found, expected = of_fsdp(tmp_path, 3), of_fsdp(saved, 3)
    states = [name for name in found if not name.startswith("param")]
    assert len(states) == 2 * 28 and not any(found[name].any() for name in states)
    weights = [{n: t for n, t in each.items() if n not in states} for each in (found, expected)]
    assert_bitwise_equal(*weights)
    alone, resumed = (train(*S3, *WHOLE, "--bf16", *load[:n], ranks=2) for n in (5, 4))
    assert alone.losses[4] == resumed.losses[4]


REFUSED = {
    "another p": (("--optimizer", "s3", "--s3-p", "2"), "was saved with --s3-p 3.0"),
    "adamw": (("--optimizer", "adamw"), "was saved by --optimizer s3"),
    "adam": (("--optimizer", "adam"), "was saved by --optimizer s3"),
}


@pytest.mark.parametrize("case", brief(REFUSED, "another p"))
def test_what_s3_saved_is_refused(case: str, saved) -> None:
    """Before anything is loaded."""
    flags, message = REFUSED[case]
    run = train(*flags, *WHOLE, "--bf16", "--load", saved, ranks=2, check=False)
    assert run.returncode != 0
    assert message in run.error and "Nothing was loaded" in run.error


@pytest.mark.thorough
@pytest.mark.parametrize("other", ["adam", "adamw"])
def test_what_another_optimizer_saved_is_refused(other: str, tmp_path) -> None:
    flags = (*WHOLE, "--bf16")
    # On one rank: on two that hold no element of some parameters, adam never ends saving.
    train("--optimizer", other, *flags, "--save", tmp_path, "--save-interval", "6")
    run = train(*S3, *flags, "--load", tmp_path, ranks=2, check=False)
    assert f"was saved by --optimizer {other}" in run.error and "Nothing was loaded" in run.error


@pytest.mark.parametrize("strategy", brief(STRATEGIES, "no_shard"))
def test_updates_are_logged_as_in_data_parallel(strategy: str, tmp_path) -> None:
    """Numbers of parameters exact, what is summed over shards to rounding; of every iteration."""
    logs = {}
    for name, flags in {"plain": SHARDED, "fsdp": (*FSDP, STRATEGY, strategy)}.items():
        folder = tmp_path / name
        log = ("--plugin-log-updates", "--tensorboard-dir", folder)
        train(*S3, *flags, *ONE_BATCH, *log, ranks=2)
        logs[name] = [r["updates"] for r in read(folder) if r["kind"] == "train"]
    assert len(logs["plain"]) == len(logs["fsdp"]) == ITERATIONS
    assert logs["fsdp"][0]["all"]["numel"] == PARAMETERS
    for plain, fsdp in zip(logs["plain"], logs["fsdp"], strict=True):
        for group in ("kinds", "layers"):
            assert plain[group].keys() == fsdp[group].keys()
            for name, expected in plain[group].items():
                assert fsdp[group][name]["numel"] == expected["numel"]
                assert fsdp[group][name] == pytest.approx(expected, rel=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_are_measured_and_clipped_as_in_data_parallel(strategy: str) -> None:
    """To rounding: ranks sum the squares of other shards."""
    flags = (*S3, "--bf16", "--clip-grad", "0.5", *ONE_BATCH)
    runs = [
        train(*flags, *more, ranks=2)
        for more in (SHARDED, (*FSDP, STRATEGY, strategy, *FP32_GRADS))
    ]
    norms = [[float(x) for x in re.findall(r"grad norm: ([\d.]+)", r.log)] for r in runs]
    assert len(norms[0]) == ITERATIONS and min(norms[0]) > 0.5  # it does clip
    assert norms[1] == pytest.approx(norms[0], abs=2e-3)
    losses = [[float(x) for x in run.losses.values()] for run in runs]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


OTHERS = ("adamw", "nadam", "adan", "lion", "sgdm", "signsgd")


@pytest.mark.thorough
@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers(name: str, plain, tmp_path) -> None:
    """Bitwise: as in plain data parallelism, and after a resume."""
    flags = ("--optimizer", name, "--bf16", "--clip-grad", "0", *ONE_BATCH)
    through, resumed = tmp_path / "through", tmp_path / "resumed"
    fsdp = (*flags, *WHOLE, *FP32_GRADS, *SAVE)
    train(*fsdp, "--save", through, ranks=2)
    train(*fsdp, "--load", through, "--ckpt-step", "3", "--save", resumed, ranks=2)
    assert_bitwise_equal(of_fsdp(through), plain(*flags)[0])
    assert_bitwise_equal(tensors(through), tensors(resumed))


@pytest.mark.thorough
@pytest.mark.parametrize("release", [release for release in RELEASES if release != INSTALLED])
def test_other_releases(release: str, tmp_path) -> None:
    """Bitwise after a resume."""
    flags = (*S3, *WHOLE, "--bf16", *SAVE)
    through, resumed = tmp_path / "through", tmp_path / "resumed"
    where = {"megatron": unpacked(release), "ranks": 2}
    one = train(*flags, "--save", through, **where)
    two = train(*flags, "--load", through, "--ckpt-step", "3", "--save", resumed, **where)
    assert float(one.losses[ITERATIONS]) < float(one.losses[1])
    assert_bitwise_equal(of_fsdp(through), of_fsdp(resumed))
    assert {i: one.losses[i] for i in (4, 6)} == two.losses
