"""Save, resume and reshard with S3's state, through the real trainer."""

from pathlib import Path

import pytest
import torch

from megatron_s3.telemetry.runlog import read
from tests.harness.trainer import ITERATIONS, Run, assert_bitwise_equal, brief, tensors, train

pytestmark = pytest.mark.slow

S3 = ["--optimizer", "s3"]
BF16 = ["--bf16", "--use-distributed-optimizer"]
RESHARDABLE = [*BF16, "--dist-ckpt-optim-fully-reshardable"]
# Without the other two flags 0.19 turns async saving off, or asks for nvidia-resiliency-ext.
ASYNC = ["--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore"]
SAVE = ["--save-interval", "3"]

SAME_LAYOUT = {
    "1 fp32": (1, []),
    "dp2 bf16": (2, ["--bf16"]),
    "dp2 bf16 sharded": (2, BF16),
    "dp2 bf16 sharded, reshardable": (2, RESHARDABLE),
    "dp2 bf16 sharded, overlapped, async": (
        2,
        [*BF16, "--overlap-grad-reduce", "--overlap-param-gather", *ASYNC],
    ),
    "dp2 fp32 sharded": (2, ["--use-distributed-optimizer"]),
    "dp2 fp16 sharded": (
        2,
        ["--fp16", "--use-distributed-optimizer", "--initial-loss-scale", "65536"],
    ),
    # The default loss scale overflows in each of the first steps: saved before there is a state.
    "dp2 fp16, before the first update": (2, ["--fp16"]),
    "dp2 fp16 sharded, before the first update": (2, ["--fp16", "--use-distributed-optimizer"]),
    # Reshardable, because in the other format Megatron fills the gaps between parameters whose
    # size is no multiple of 64 with memory as it finds it.
    "tp2 bf16 sharded": (2, [*RESHARDABLE, "--tensor-model-parallel-size", "2"]),
    "pp2 bf16 sharded": (2, [*BF16, "--pipeline-model-parallel-size", "2"]),
    "ep2 bf16 sharded": (
        2,
        [
            *RESHARDABLE,
            "--num-experts",
            "2",
            "--expert-model-parallel-size",
            "2",
            "--no-bias-gelu-fusion",
        ],
    ),
}


@pytest.mark.parametrize("layout", SAME_LAYOUT)
def test_same_layout_resumes_bitwise(layout: str, tmp_path: Path) -> None:
    """Bitwise: a run that stops after 3 steps and one that does not end with the same tensors.

    All of them: model, main parameters and both states, in what each saves after 6 steps.
    """
    ranks, flags = SAME_LAYOUT[layout]
    through, resumed = tmp_path / "through", tmp_path / "resumed"
    one = train(*S3, *flags, *SAVE, "--save", through, ranks=ranks)
    two = train(
        *S3, *flags, *SAVE, "--load", through, "--ckpt-step", 3, "--save", resumed, ranks=ranks
    )
    saved = tensors(through)
    assert {"exp_avg", "exp_pnorm"} <= {part for name in saved for part in name.split(".")}
    assert_bitwise_equal(saved, tensors(resumed))
    assert one.losses_after(3) == two.losses_after(3)


@pytest.mark.parametrize("name", brief(("s3", "adam"), "s3"))
def test_torch_format_resumes_what_was_verified(name: str, tmp_path: Path) -> None:
    """The legacy `--ckpt-format torch`, where data-parallel rank 0 gathers the state.

    Bitwise: all that is in the files of a run that stops after 3 steps and one that does not.
    """
    flags = ["--optimizer", name, *BF16, "--ckpt-format", "torch", *SAVE]
    resumed, six = tmp_path / "resumed", "iter_0000006/mp_rank_00/distrib_optim.pt"
    one = train(*flags, "--save", tmp_path, ranks=2)
    state = torch.load(tmp_path / six, weights_only=False)
    content = bytearray((tmp_path / six).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / six).write_bytes(content)
    refused = train(*flags, "--load", tmp_path, ranks=2, check=False)
    assert "distrib_optim.pt is damaged" in refused.error
    assert refused.error.endswith("Choose an iteration with --ckpt-step; complete: 3.")
    two = train(*flags, "--load", tmp_path, "--ckpt-step", 3, "--save", resumed, ranks=2)
    assert one.losses_after(3) == two.losses_after(3)
    (dtypes,) = (found for key, found in state.items() if key != "buckets_coalesced")
    (again,) = (
        found
        for key, found in torch.load(resumed / six, weights_only=False).items()
        if key != "buckets_coalesced"
    )
    for dtype, tensors_ in dtypes.items():
        for key, tensor in tensors_.items():
            assert tensor.equal(again[dtype][key]) if key != "numel_unpadded" else True


#: Megatron's conversion between checkpoint formats: loads, saves and exits without a step.
AND_SAVE_AT_ONCE = ["--ckpt-convert-format", "torch_dist", "--ckpt-convert-save"]

RESHARDED = {
    # name: ranks, flags, largest difference of the loss after 3 more steps, in nats.
    "dp1": (1, [], 1e-4),
    "dp4": (4, [], 1e-4),
    "tp2": (2, ["--tensor-model-parallel-size", "2"], 2e-3),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"], 1e-3),
}


# Ranks draw their own dropout: in another layout other masks fall on other samples.  And untied,
# because from pipeline stages Megatron saves something else for a tied embedding's main parameter
# and state than what it has loaded (0.19.2, fully_reshardable; with Adam as with S3).
COMPARABLE = [
    *["--attention-dropout", "0", "--hidden-dropout", "0"],
    "--untie-embeddings-and-output-weights",
]


@pytest.fixture(scope="module")
def dp2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A run over 2 data-parallel ranks, saved fully reshardable after 3 and 6 steps."""
    directory = tmp_path_factory.mktemp("dp2")
    return directory, train(*S3, *RESHARDABLE, *COMPARABLE, *SAVE, "--save", directory, ranks=2)


@pytest.mark.parametrize("layout", RESHARDED)
def test_another_layout_loads_bitwise(layout: str, dp2: tuple[Path, Run], tmp_path: Path) -> None:
    """Bitwise: model, main parameters and both states, loaded and saved again without a step."""
    ranks, flags, _ = RESHARDED[layout]
    load = ["--load", dp2[0], "--ckpt-step", 3]
    train(*S3, *RESHARDABLE, *COMPARABLE, *flags, *load, *AND_SAVE_AT_ONCE, tmp_path, ranks=ranks)
    assert_bitwise_equal(tensors(dp2[0], 3), tensors(tmp_path / "torch_dist", 3))


@pytest.mark.parametrize("layout", brief(RESHARDED, "tp2"))
def test_another_layout_continues_the_run(layout: str, dp2: tuple[Path, Run]) -> None:
    """Within a bound: another layout sums gradients in another order and rounds at other places."""
    ranks, flags, bound = RESHARDED[layout]
    directory, unbroken = dp2
    load = ["--load", directory, "--ckpt-step", 3]
    resumed = train(*S3, *RESHARDABLE, *COMPARABLE, *flags, *load, ranks=ranks)
    difference = abs(float(resumed.losses[ITERATIONS]) - float(unbroken.losses[ITERATIONS]))
    print(f"{layout}: the loss differs by {difference:.1e} nats after 3 steps")
    assert difference <= bound


RATES = [
    f"{name}, {flags}"
    for name in ("s3", "adam")
    for flags in ("", "--bf16", *(" ".join(flags) for flags in (BF16, RESHARDABLE)))
]


@pytest.mark.parametrize("case", brief(RATES, f"s3, {' '.join(BF16)}"))
def test_a_run_goes_on_with_another_rate_where_it_is_said_whose_counts(
    case: str, tmp_path: Path
) -> None:
    name, flags = case.split(", ")
    flags = ["--optimizer", name, *flags.split(), "--lr-decay-style", "constant"]
    flags += ["--lr-warmup-iters", "0", "--train-iters", "4"]
    train(*flags, "--save", tmp_path, "--save-interval", 2)
    flags += ["--load", tmp_path, "--ckpt-step", 2, "--lr", "1e-3", "--min-lr", "1e-4"]
    refused = train(*flags, check=False)
    assert refused.returncode and "was saved with --lr 0.003 --min-lr 0.0, and" in refused.error
    assert "--override-opt_param-scheduler" in refused.error and not refused.losses
    for whose, rate in (("override", 1e-3), ("use-checkpoint", 3e-3)):
        run = train(*flags, f"--{whose}-opt_param-scheduler")
        rates = {i: float(lr) for i, lr in run.column("learning rate").items()}
        assert rates == {3: rate, 4: rate}


@pytest.mark.parametrize("form", ["torch_dist", "torch"])
def test_a_run_with_the_checkpoints_rates_is_resumed_with_these_rates(tmp_path, form) -> None:
    """Its arguments name others; what it saves and logs names those that it used."""
    flags = [*S3, *BF16, "--lr-decay-iters", "9", "--ckpt-format", form, "--save-interval", "2"]
    first, second = tmp_path / "first", tmp_path / "second"
    train(*flags, "--save", first, "--exit-interval", "2")
    used = train(
        *(*flags, "--load", first, "--save", second, "--exit-interval", "4", "--lr", "1e-3"),
        *("--use-checkpoint-opt_param-scheduler", "--plugin-metrics"),
    )
    assert float(used.column("learning rate")[3]) > 1e-3
    (start, *_) = read(second)
    assert start["hyperparameters"]["lr"] == 3e-3
    refused = train(*flags, "--load", second, "--lr", "1e-3", check=False)
    assert "was saved with --lr 0.003, and this run has --lr 0.001." in refused.error
    assert train(*flags, "--load", second).loaded == 4
