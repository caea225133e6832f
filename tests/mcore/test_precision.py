"""--use-precision-aware-optimizer without Transformer Engine: states, checkpoints, conversions."""

from pathlib import Path

import pytest
import torch

from megatron_s3 import cli
from tests.harness.releases import RELEASES, unpacked
from tests.harness.trainer import assert_bitwise_equal, brief, tensors, train

pytestmark = pytest.mark.slow

S3 = ["--optimizer", "s3", "--use-distributed-optimizer", "--save-interval", "3"]
AWARE = [*S3, "--bf16", "--use-precision-aware-optimizer"]
BF16_STATES = ["--exp-avg-dtype", "bf16", "--exp-avg-sq-dtype", "bf16"]
BF16_GRADS = ["--main-grads-dtype", "bf16"]
RESHARDABLE = ["--dist-ckpt-optim-fully-reshardable"]
#: Megatron's conversion between checkpoint formats: loads, saves and exits without a step.
AND_SAVE_AT_ONCE = ["--ckpt-convert-format", "torch_dist", "--ckpt-convert-save"]

SMALL_STATES = ["--exp-avg-dtype", "fp8", "--exp-avg-sq-dtype", "bf16"]

RESUMED = {
    "int8, dp_reshardable": (2, [*AWARE, *SMALL_STATES, *BF16_GRADS]),
    "int8, fully_reshardable": (2, [*AWARE, *SMALL_STATES, *RESHARDABLE]),
    "int8, torch": (2, [*AWARE, *SMALL_STATES, "--ckpt-format", "torch"]),
    "int8, overlapped": (
        2,
        [*AWARE, *SMALL_STATES, "--overlap-grad-reduce", "--overlap-param-gather"],
    ),
    "dp_reshardable": (2, [*AWARE, *BF16_STATES]),
    "fully_reshardable": (2, [*AWARE, *BF16_STATES, *RESHARDABLE]),
    "torch": (2, [*AWARE, *BF16_STATES, "--ckpt-format", "torch"]),
    "fp32 states": (2, AWARE),
    "one state in bf16, gradients in bf16": (2, [*AWARE, "--exp-avg-dtype", "bf16", *BF16_GRADS]),
    "overlapped": (2, [*AWARE, *BF16_STATES, "--overlap-grad-reduce", "--overlap-param-gather"]),
    "tp2": (2, [*AWARE, *BF16_STATES, *RESHARDABLE, "--tensor-model-parallel-size", "2"]),
    "fp16": (
        2,
        [
            *S3,
            *["--fp16", "--initial-loss-scale", "65536", "--use-precision-aware-optimizer"],
            *["--accumulate-allreduce-grads-in-fp32", *BF16_STATES],
        ],
    ),
}


def states(saved: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in saved.items() if name in key.split(".")}


@pytest.mark.parametrize(
    "layout", brief(RESUMED, "dp_reshardable", "int8, dp_reshardable", "int8, fully_reshardable")
)
def test_resumes_bitwise(layout: str, tmp_path: Path) -> None:
    """Model, main parameters and both states, in what each saves after 6 steps; and the losses."""
    ranks, flags = RESUMED[layout]
    through, resumed = tmp_path / "through", tmp_path / "resumed"
    one = train(*flags, "--save", through, ranks=ranks)
    (through / "latest_checkpointed_iteration.txt").write_text("3")
    two = train(*flags, "--load", through, "--save", resumed, ranks=ranks)
    assert one.losses_after(3) == two.losses_after(3)
    assert not any("was saved with" in line for line in two.said)
    if not layout.endswith("torch"):
        assert_bitwise_equal(tensors(through), tensors(resumed))


@pytest.mark.parametrize("release", brief(RELEASES[:-1], RELEASES[0]))
def test_older_releases_resume(release: str, tmp_path: Path) -> None:
    flags = [*AWARE, *BF16_STATES]
    through, resumed, tree = tmp_path / "through", tmp_path / "resumed", unpacked(release)
    train(*flags, "--save", through, ranks=2, megatron=tree)
    load = ["--load", through, "--ckpt-step", 3]
    train(*flags, *load, "--save", resumed, ranks=2, megatron=tree)
    saved = tensors(through)
    assert {t.dtype for t in states(saved, "exp_pnorm").values()} == {torch.bfloat16}
    assert_bitwise_equal(saved, tensors(resumed))


@pytest.mark.parametrize("grads", [[], BF16_GRADS], ids=["fp32", "bf16"])
def test_fp32_states_are_those_without_the_flag(grads: list[str], tmp_path: Path) -> None:
    """Bitwise, in losses and every tensor: only who holds the main parameters is another."""
    plain = [*S3, "--bf16", *RESHARDABLE, *(["--grad-reduce-in-bf16"] if grads else [])]
    without = train(*plain, "--save", tmp_path / "without", ranks=2)
    flags = [*AWARE, *grads, *RESHARDABLE, "--plugin-no-param-remainders"]
    aware = train(*flags, "--save", tmp_path / "aware", ranks=2)
    assert without.losses == aware.losses
    assert_bitwise_equal(tensors(tmp_path / "without"), tensors(tmp_path / "aware"))


@pytest.mark.parametrize("form", [[], RESHARDABLE], ids=["dp_reshardable", "fully_reshardable"])
def test_checkpoints_convert(form: list[str], tmp_path: Path) -> None:
    """To bf16 rounded to nearest, to fp32 exactly, and said once; main parameters stay fp32.

    With Transformer Engine a checkpoint holds all states in fp32 and loads into any dtype: users
    change --exp-avg-dtype from one job to the next.
    """
    wide, narrow, back = (tmp_path / name for name in ("wide", "narrow", "back"))
    train(*S3, "--bf16", *form, "--save", wide, ranks=2)
    load = [*AWARE, *form, "--load"]
    run = train(*load, wide, *BF16_STATES, *AND_SAVE_AT_ONCE, narrow, ranks=2)
    saved, loaded = tensors(wide), tensors(narrow / "torch_dist")
    said = [line for line in run.said if "was saved with" in line]
    assert [line.partition("was saved with ")[2] for line in said] == [
        f"{name} in torch.float32; it is loaded as torch.bfloat16"
        for name in ("exp_avg", "exp_pnorm")
    ]
    for name in ("exp_avg", "exp_pnorm"):
        assert states(saved, name)
        for key, tensor in states(saved, name).items():
            rounded = tensor.bfloat16()
            assert torch.equal(loaded[key].float(), rounded.float()), key
            assert form or loaded[key].dtype == torch.bfloat16
    main = states(saved, "param")
    assert main
    assert all(torch.equal(main[key], loaded[key]) for key in main)

    again = train(*load, narrow / "torch_dist", *AND_SAVE_AT_ONCE, back, ranks=2)
    assert any("exp_avg in torch.bfloat16; it is loaded as torch.float32" in s for s in again.said)
    widened = tensors(back / "torch_dist")
    for key in loaded:
        assert torch.equal(loaded[key].float(), widened[key].float()), key
        if states({key: 0}, "exp_avg") or states({key: 0}, "exp_pnorm"):
            assert widened[key].dtype == torch.float32


def test_weights_alone_reach_the_main_parameters(tmp_path: Path) -> None:
    """--finetune: the first loss is the loaded model's, and so is the one after an update."""
    train(*S3, "--bf16", "--save", tmp_path, ranks=2)
    load = ["--load", tmp_path, "--finetune", "--seed", "4321"]
    plain = train(*S3, "--bf16", *load, ranks=2)
    aware = train(*AWARE, "--plugin-no-param-remainders", *load, ranks=2)
    assert plain.losses == aware.losses
    remainders = train(*AWARE, *load, ranks=2)
    first = [list(run.losses.values())[:2] for run in (plain, remainders)]
    assert first[0] == first[1]


@pytest.mark.parametrize("form", [RESHARDABLE, []], ids=["fully_reshardable", "dp_reshardable"])
def test_int8_states_load_in_any_precision_and_on_other_ranks(
    form: list[str], tmp_path: Path
) -> None:
    """Bitwise: values in bf16, from which other ranks make the same fractions again."""
    here, elsewhere, wide, back = (tmp_path / name for name in ("here", "2", "wide", "back"))
    small = [*AWARE, *SMALL_STATES, *form]
    train(*small, "--save", here, ranks=2)
    saved = tensors(here)
    kinds = {t.dtype for t in states(saved, "exp_avg").values()}
    assert kinds == {torch.float32 if form else torch.bfloat16}
    run = train(*small, "--load", here, *AND_SAVE_AT_ONCE, elsewhere, ranks=1)
    assert not any("was saved with" in line for line in run.said)
    loaded = tensors(elsewhere / "torch_dist")
    if form:  # of dp_reshardable the names and shapes depend on the number of ranks
        assert_bitwise_equal(saved, loaded)
    load = [*S3, "--bf16", *form, "--load", here]
    run = train(*load, *AND_SAVE_AT_ONCE, wide, ranks=2)
    assert any("exp_avg in torch.int8; it is loaded as torch.float32" in s for s in run.said)
    widened = tensors(wide / "torch_dist")
    for key in (*states(saved, "exp_avg"), *states(saved, "param")):
        assert torch.equal(saved[key].float(), widened[key].float()), key
    run = train(*small, "--load", wide / "torch_dist", *AND_SAVE_AT_ONCE, back, ranks=2)
    assert_bitwise_equal(saved, tensors(back / "torch_dist"))


def test_a_state_from_adamw_is_refused_as_fractions(tmp_path: Path) -> None:
    """Its exp_avg may exceed exp_pnorm; in bf16 it is loaded."""
    adamw, s3 = tmp_path / "adamw", tmp_path / "s3"
    flags = ["--use-distributed-optimizer", "--bf16", "--save-interval", "3", *RESHARDABLE]
    train(*flags, "--optimizer", "adamw", "--adamw-beta2", "0.5", "--save", adamw, ranks=2)
    assert cli.main(["convert", str(adamw), str(s3), "--to", "s3"]) == 0
    load = [*AWARE, *RESHARDABLE, "--load", s3, "--override-opt_param-scheduler"]
    small = train(*load, *SMALL_STATES, ranks=2, check=False)
    assert small.returncode != 0
    assert "exceeds exp_pnorm in" in small.log and "as after a conversion from AdamW" in small.log
    train(*load, *BF16_STATES, ranks=2)
