"""Megatron's Muon, and an optimizer of the plugin for what Muon leaves to another."""

import contextlib
import functools
import io
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from megatron_s3.storage import index
from tests.harness.releases import unpacked
from tests.harness.trainer import (
    REPOSITORY,
    Run,
    assert_bitwise_equal,
    brief,
    forks,
    tensors,
    train,
)
from tests.mcore.library import on_ranks, step

pytestmark = pytest.mark.slow

#: Where scripts/test.sh unpacks the package that has Muon.
EMERGING = REPOSITORY / ".venv/emerging-optimizers/0.3.0"


@functools.cache
def beside(release: str | None = None) -> Path:
    """A folder with that package, and another release of Megatron than the installed one."""
    if not EMERGING.is_dir():
        pytest.skip(f"emerging-optimizers is not unpacked at {EMERGING}; scripts/test.sh does it")
    if release is None:
        return EMERGING
    folder = Path(tempfile.mkdtemp(prefix="muon"))
    for each in (*EMERGING.iterdir(), unpacked(release) / "megatron"):
        (folder / each.name).symlink_to(each)
    return folder


def with_muon(release: str | None = None):
    """Ranks in which Muon can be imported."""
    return on_ranks(2, started=lambda: forks(beside(release)))


# ---- the library --------------------------------------------------------------------------------


def build(*, layout: bool = True, bf16: bool = True, scalar: str = "s3"):
    """Two linear layers, sharded by layers as Megatron's trainer does it, and what it says."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig
    from megatron.training.training import wrap_model_chunks_with_ddp

    config = TransformerConfig(num_layers=1, hidden_size=40, num_attention_heads=1, bf16=bf16)
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 20))
    layers.config = config
    (model,) = wrap_model_chunks_with_ddp(
        [layers.bfloat16() if bf16 else layers],
        config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True),
        use_layer_wise_distributed_optimizer=True,
        use_layer_wise_param_layout=layout,
    )
    chosen = OptimizerConfig(
        optimizer="muon",
        muon_scalar_optimizer=scalar,
        lr=0.1,
        bf16=bf16,
        use_layer_wise_distributed_optimizer=True,
    )
    with contextlib.redirect_stdout(io.StringIO()) as said:
        optimizer = get_megatron_optimizer(chosen, [model], {})
    return model, optimizer, said.getvalue().replace("[megatron_s3] ", "").splitlines()


@with_muon()
def test_each_parameter_is_stepped_by_one_optimizer_on_one_rank():
    """A matrix as a whole by Muon, and each element of a bias by S3."""
    model, optimizer, said = build()
    muon, s3 = optimizer.chained_optimizers
    assert type(s3.optimizer).__name__ == "S3"
    whole = [p for part in muon.chained_optimizers for g in part.float16_groups for p in g]
    shards = [p for g in s3.optimizer.param_groups for p in g["params"]]
    assert all(param.dim() == 2 for param in whole)
    owned = torch.tensor([sum(p.numel() for p in each) for each in (whole, shards)])
    torch.distributed.all_reduce(owned)
    assert owned.tolist() == [40 * 30 + 30 * 20, 30 + 20]
    if torch.distributed.get_rank() == 0:
        head = next(i for i, line in enumerate(said) if line.startswith("pattern"))
        assert [line.split() for line in said[head:]] == [
            ["pattern", "parameters", "optimizer", "lr", "weight_decay"],
            ["matrices", "1,800", "Muon", "0.1", "0.01"],
            ["all", "others", "50", "S3", "(SoftSignSGD)", "0.1", "0.01"],
        ]
    before = [param.detach().clone() for param in model.parameters()]
    success, norm, _ = step(model, optimizer)
    assert success and norm > 0
    model.start_param_sync(force_sync=True)
    for old, new in zip(before, model.parameters(), strict=True):
        gathered = [torch.empty_like(new) for _ in range(2)]
        torch.distributed.all_gather(gathered, new.detach())
        assert torch.equal(*gathered) and not torch.equal(old, new)


@with_muon()
def test_a_matrix_that_nobody_steps_is_an_error():
    from megatron_s3.mcore import muon

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "_muons", lambda built, others: [])
        with pytest.raises(ValueError, match="no optimizer was built for 2 of 4 trainable param"):
            build()


@with_muon()
def test_all_ranks_have_the_error_of_one():
    """A pipeline stage may have no experts, and would wait for the ranks that ended."""
    from megatron_s3.mcore import muon
    from megatron_s3.mcore.refusal import AllRanksError

    with pytest.MonkeyPatch.context() as patch:
        experts = ["experts.bias"] if torch.distributed.get_rank() == 1 else []
        patch.setattr(muon, "_vectors_of_experts", lambda named: experts)
        with pytest.raises(AllRanksError, match=r"not support experts\.bias: Megatron shards"):
            build()


@with_muon()
def test_a_model_without_the_layout_and_one_in_fp32_are_refused():
    with pytest.raises(ValueError, match=r"s3 with sharded states needs DDP's layout of the par"):
        build(layout=False)
    with pytest.raises(ValueError, match=r"s3 with sharded states does not support models in fp32"):
        build(bf16=False)
    build(layout=False, scalar="adam")  # which is Megatron's own


@with_muon("0.18.2")
def test_a_release_that_builds_another_optimizer_is_an_error():
    """0.18 reads the name nowhere; the plugin gives it to Megatron's registry."""
    from megatron.core.optimizer import emerging_optimizers

    from megatron_s3.mcore import compat_before_0_19 as compat

    before = emerging_optimizers._EMERGING_OPTIMIZERS["muon"]
    _, optimizer, _ = build()
    assert type(optimizer.chained_optimizers[1].optimizer).__name__ == "S3"
    assert emerging_optimizers._EMERGING_OPTIMIZERS["muon"] is before
    assert [e["optimizer"] for e in before.default_param_overrides.values()] == ["adam"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat, "needed_for_muon", lambda: False)
        with pytest.raises(ValueError, match="optimizer s3: it has built AdamW for the parameters"):
            build()


# ---- the trainer --------------------------------------------------------------------------------

SAVE = ["--save-interval", "3"]
SHARDED = ["--use-distributed-optimizer"]
RESHARDABLE = [*SHARDED, "--dist-ckpt-optim-fully-reshardable"]
EXPERTS = ["--num-experts", "2", "--expert-model-parallel-size", "2", "--no-bias-gelu-fusion"]
LAYOUTS = {
    "not sharded": [],
    "sharded": SHARDED,
    "sharded, reshardable": RESHARDABLE,
    "dist_muon": ["--optimizer", "dist_muon"],
    "overlapped": [*SHARDED, "--overlap-grad-reduce", "--overlap-param-gather"],
    "tp2": [*RESHARDABLE, "--tensor-model-parallel-size", "2"],
    "pp2": [*SHARDED, "--pipeline-model-parallel-size", "2"],
    "experts": [*SHARDED, *EXPERTS, "--disable-bias-linear"],
    "experts, not sharded": EXPERTS,
}


def muon(*flags: object, ranks: int = 2, release: str | None = None, check: bool = True) -> Run:
    """Trains with Muon, and S3 for the rest."""
    chosen = ["--optimizer", "muon", "--muon-scalar-optimizer", "s3", "--bf16"]
    return train(*chosen, *flags, ranks=ranks, megatron=beside(release), check=check)


def check_resumed(tmp_path: Path, *flags: object, release: str | None = None) -> None:
    """Trains, and again from the middle: the same bits."""
    through, resumed = tmp_path / "through", tmp_path / "resumed"
    flags = ["--s3-p", 2, *flags]
    one = muon(*flags, *SAVE, "--save", through, release=release)
    load = ["--load", through, "--ckpt-step", 3]
    two = muon(*flags, *SAVE, *load, "--save", resumed, release=release)
    assert_bitwise_equal(tensors(through), tensors(resumed))
    assert one.losses_after(3) == two.losses_after(3) != {}
    assert any(line.startswith("S3 (SoftSignSGD) with beta=0.95 p=2.0") for line in one.said)
    table = [line.split() for line in one.said if line.startswith(("matrices", "all others"))]
    if release != "0.17.1":  # whose trainer has another builder for Muon
        assert [row[-3] for row in table] == ["Muon", "(SoftSignSGD)"]


def owned(folder: Path) -> dict[str, set[str]]:
    """The parameters that have S3's and Muon's states in a reshardable checkpoint."""
    return {
        state: {name.partition(f".{state}.")[2] for name in tensors(folder) if f".{state}." in name}
        for state in ("exp_pnorm", "momentum_buffer")
    }


@pytest.mark.parametrize("layout", brief(LAYOUTS, "not sharded", "sharded"))
def test_a_run_resumes_bitwise(layout: str, tmp_path: Path) -> None:
    check_resumed(tmp_path, *LAYOUTS[layout])


@pytest.mark.parametrize(
    ("release", "layout"),
    [
        ("0.18.2", "sharded"),
        pytest.param("0.18.2", "not sharded", marks=pytest.mark.thorough),
        pytest.param("0.17.1", "not sharded", marks=pytest.mark.thorough),
    ],
)
def test_a_run_resumes_bitwise_with_other_releases(
    release: str, layout: str, tmp_path: Path
) -> None:
    check_resumed(tmp_path, *LAYOUTS[layout], release=release)


@pytest.fixture(scope="module")
def dp2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("muon")
    muon(*RESHARDABLE, *SAVE, "--save", folder)
    return folder


def test_each_parameter_has_the_states_of_one_optimizer(dp2: Path) -> None:
    states = owned(dp2)
    assert "embedding.word_embeddings.weight" in states["exp_pnorm"]
    assert "decoder.layers.mlp.linear_fc1.weight" in states["momentum_buffer"]
    assert not states["exp_pnorm"] & states["momentum_buffer"]
    assert states["exp_pnorm"] | states["momentum_buffer"] == {
        name for name in tensors(dp2) if not name.startswith("optimizer.")
    }


AT_ONCE = ["--ckpt-convert-format", "torch_dist", "--ckpt-convert-save"]


@pytest.mark.parametrize("how", brief(["reshardable", "dp_reshardable"], "reshardable"))
def test_other_numbers_of_ranks_load_bitwise(how: str, dp2: Path, tmp_path: Path) -> None:
    """From 2 ranks to 1 and back without a step, then on as if nothing had happened."""
    flags = RESHARDABLE
    if how == "dp_reshardable":
        flags, dp2 = SHARDED, tmp_path / "dp2"
        muon(*flags, *SAVE, "--save", dp2)
    one, two = tmp_path / "one", tmp_path / "two"
    muon(*flags, "--load", dp2, "--ckpt-step", 3, *AT_ONCE, one, ranks=1)
    assert_bitwise_equal(tensors(dp2, 3), tensors(one / "torch_dist", 3))
    muon(*flags, "--load", one / "torch_dist", *AT_ONCE, two)
    assert_bitwise_equal(tensors(dp2, 3), tensors(two / "torch_dist", 3))
    muon(*flags, *SAVE, "--load", two / "torch_dist", "--save", tmp_path / "on")
    assert_bitwise_equal(tensors(dp2), tensors(tmp_path / "on"))


@pytest.mark.thorough
def test_sharded_states_have_the_bits_of_whole_ones(dp2: Path, tmp_path: Path) -> None:
    """Without clipping, because a norm is summed in another order."""
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    for flags, folder in ([], whole), (RESHARDABLE, sharded):
        muon("--clip-grad", 0, *flags, *SAVE, "--save", folder)
    pairs = {name.replace(".param.", ".fp32_param."): t for name, t in tensors(sharded).items()}
    assert_bitwise_equal(tensors(whole), pairs)


@pytest.mark.parametrize("sharded", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_a_run_with_another_optimizer_for_the_rest_is_refused(
    sharded: bool, dp2: Path, tmp_path: Path
) -> None:
    flags = RESHARDABLE if sharded else []
    if not sharded:
        muon(*SAVE, "--save", dp2 := tmp_path / "whole")
    for other, why in (
        (["--muon-scalar-optimizer", "adam"], "--muon-scalar-optimizer s3, whose"),
        (["--s3-p", "2"], "was saved with --s3-p 3.0"),
    ):
        run = muon(*flags, *other, "--load", dp2, check=False)
        assert run.returncode and not run.trained
        assert why in run.error and "Nothing was loaded" in run.error


def test_a_flipped_bit_of_either_state_is_refused(dp2: Path, tmp_path: Path) -> None:
    for state in ("exp_pnorm.embedding", "momentum_buffer.embedding"):
        damaged = tmp_path / state
        shutil.copytree(dp2, damaged)
        entries = index.read(damaged / "iter_0000006").storage_data
        found = [entry for place, entry in entries.items() if f".{state}." in place.fqn]
        data = damaged / "iter_0000006" / found[0].relative_path
        content = bytearray(data.read_bytes())
        content[found[0].offset + found[0].length // 2] ^= 1
        data.write_bytes(content)
        run = muon(*RESHARDABLE, "--load", damaged, check=False)
        assert run.returncode and not run.trained
        assert f"{data.name} is damaged" in run.error


WITHOUT = "error: --muon-scalar-optimizer s3 with sharded states does not support "


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*SHARDED, "--no-use-layer-wise-param-layout"], WITHOUT + "--no-use-layer-wise-param-lay"),
        pytest.param(
            [*SHARDED, "--ckpt-format", "torch"],
            WITHOUT + "--ckpt-format torch: Megatron cannot",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            [*SHARDED, "--num-distributed-optimizer-instances", "2"],
            WITHOUT + "--num-distributed-optimizer-instances 2: ",
            marks=pytest.mark.thorough,
        ),
        (
            ["--use-precision-aware-optimizer"],
            "error: --muon-scalar-optimizer s3 does not support --use-precision-aware-optimizer",
        ),
        pytest.param(
            ["--s3-p", "0.5"],
            "error: --s3-p must be in [1, inf), not 0.5",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            ["--adamw-eps", "1"],
            "error: --adamw-eps is a flag of --optimizer adamw, but",
            marks=pytest.mark.thorough,
        ),
        (["--plugin-overrides", "*: lr=1"], "error: --plugin-overrides does nothing with --optim"),
    ],
)
def test_what_muon_and_s3_cannot_do_together_is_refused(flags: list[str], message: str) -> None:
    run = muon(*flags, check=False)
    assert run.returncode == 2 and run.error.startswith(message), run.log[-3000:]


def test_biases_of_experts_and_an_older_release_are_refused() -> None:
    run = muon(*SHARDED, *EXPERTS, check=False)
    assert run.returncode and not run.trained
    assert "linear_fc1.bias: Megatron shards no parameters of experts but matrices" in run.error
    for flags in SHARDED, ["--optimizer", "dist_muon"]:
        run = muon(*flags, release="0.17.1", check=False)
        assert run.returncode == 2 and run.error.startswith(WITHOUT + "this release of Megatron")
