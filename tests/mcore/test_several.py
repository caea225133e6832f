"""Several optimizers, chosen by pattern of parameter names, are sharded, saved and resumed."""

import contextlib
import io
from pathlib import Path

import pytest
import torch

from tests.harness.releases import RELEASES
from tests.harness.trainer import assert_bitwise_equal, brief, tensors, train
from tests.mcore.library import build, inner, on_ranks, step

#: In the small model of the library: the weight and the bias of the second layer.
RULES = ["*1.weight: optimizer=adamw lr=0.01 beta1=0.8", "*1.bias: optimizer=lion lr=0.02"]


def main_params(optimizer) -> list[torch.Tensor]:
    return [p for group in inner(optimizer).param_groups for p in group["params"]]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("sharded", [True, False])
@on_ranks(1)
def test_each_parameter_has_the_bits_that_its_optimizer_alone_gives_it(release, sharded):
    """Compares S3, AdamW and Lion together with each alone on the whole model."""
    model, optimizer = build(plugin_overrides=RULES, sharded=sharded)
    alone = {
        "0.weight": build("s3", sharded=sharded),
        "0.bias": build("s3", sharded=sharded),
        "1.weight": build("adamw", lr=0.01, adamw_beta1=0.8, sharded=sharded),
        "1.bias": build("lion", lr=0.02, sharded=sharded),
    }
    for seed in range(3):
        step(model, optimizer, seed)
        for other, its in alone.values():
            step(other, its, seed)
    for name, param in model.named_parameters():
        (other,) = (m for end, (m, _) in alone.items() if name.endswith(end))
        assert torch.equal(param, dict(other.named_parameters())[name]), name


@on_ranks(2)
def test_overrides_of_a_program_are_those_of_the_rules():
    from megatron.core.optimizer import ParamKey

    asked = {
        ParamKey(name="*1.weight"): {"optimizer": "adamw", "lr": 0.01, "beta1": 0.8},
        ParamKey(name="*1.bias"): {"optimizer": "lion", "lr": 0.02},
    }
    model, optimizer = build(overrides=asked)
    other, its = build(overrides={}, plugin_overrides=RULES)
    for seed in range(2):
        step(model, optimizer, seed)
        step(other, its, seed)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    groups, same = (inner(each).param_groups for each in (optimizer, its))
    assert [{**g, "params": 0} for g in groups] == [{**g, "params": 0} for g in same]


@on_ranks(1)
def test_the_table_has_the_learning_rates_of_megatrons_own_overrides():
    """``--decoupled-lr`` is in force for what a rule or Muon leaves."""
    from megatron.core.optimizer import OptimizerConfig, ParamKey

    from megatron_s3.mcore import announcement
    from megatron_s3.optimizers import S3

    named = [(name, torch.nn.Parameter(torch.zeros(2, 3))) for name in ("embedding", "fc1", "fc2")]
    named[0][1].is_embedding_or_output_parameter = True
    rule = {ParamKey(name="fc2"): {"algorithm": "adamw", "max_lr": 0.3}}
    decoupled = {ParamKey(attr="is_embedding_or_output_parameter"): {"max_lr": 0.01}}
    config = OptimizerConfig(optimizer="s3", lr=0.1, weight_decay=0.5)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        announcement.announce_parts(rule | decoupled, named, S3, config)
        announcement.announce_muon(named[1:], named[:1], decoupled, S3, config)
    assert [line.split()[1:] for line in said.getvalue().splitlines()] == [
        ["pattern", "parameters", "optimizer", "lr", "weight_decay"],
        ["fc2", "6", "AdamW", "0.3", "0.5"],
        ["all", "others", "12", "S3", "(SoftSignSGD)", "0.01", "or", "0.1", "0.5"],
        ["pattern", "parameters", "optimizer", "lr", "weight_decay"],
        ["matrices", "12", "Muon", "0.1", "0.5"],
        ["all", "others", "6", "S3", "(SoftSignSGD)", "0.01", "0.5"],
    ]


@on_ranks(2)
def test_a_state_is_saved_by_its_position_and_no_memory_is_added():
    """Lion has one state: at the second position the file has zeros for its parameters."""
    from megatron_s3.mcore.distributed import names_in_shards

    model, optimizer = build(plugin_overrides=RULES)
    step(model, optimizer)
    (part,) = optimizer.chained_optimizers
    assert part.optimizer_state_keys == ("exp_avg", "exp_pnorm_or_exp_avg_sq")
    assert names_in_shards(inner(build("s3")[1])) == ("exp_avg", "exp_pnorm")
    made = {
        frozenset(inner(optimizer).state[p]): group["algorithm"]
        for group in inner(optimizer).param_groups
        for p in group["params"]
    }
    known = {
        frozenset({"exp_avg", "exp_pnorm"}): "s3",
        frozenset({"exp_avg", "exp_avg_sq"}): "adamw",
        frozenset({"exp_avg"}): "lion",
    }
    assert made.items() <= known.items()
    for param in model.parameters():
        with contextlib.suppress(KeyError):  # this rank has no element of it
            saved = part._get_main_param_and_optimizer_states(param)
            group, _ = part.model_param_group_index_map[param]
            is_lion = inner(optimizer).param_groups[group]["algorithm"] == "lion"
            assert saved["exp_pnorm_or_exp_avg_sq"].any() != is_lion


@on_ranks(1)
def test_the_start_shows_who_owns_what():
    with contextlib.redirect_stdout(io.StringIO()) as said:
        build(plugin_overrides=[*RULES, "*0.weight: weight_decay=0.5"])
    lines = [line.removeprefix("[megatron_s3] ") for line in said.getvalue().splitlines()]
    head = next(i for i, line in enumerate(lines) if line.startswith("pattern"))
    assert [line.split() for line in lines[head:]] == [
        ["pattern", "parameters", "optimizer", "lr", "weight_decay"],
        ["*1.weight", "600", "AdamW", "0.01", "0.01"],
        ["*1.bias", "20", "Lion", "0.02", "0.01"],
        ["*0.weight", "1,200", "S3", "(SoftSignSGD)", "0.1", "0.5"],
        ["all", "others", "30", "S3", "(SoftSignSGD)", "0.1", "0.01"],
    ]
    assert any(line.startswith("AdamW with beta1=0.8 beta2=0.95") for line in lines)


@on_ranks(2)
def test_the_log_of_updates_knows_each_optimizer():
    """Counts, and the sizes of the updates, as each alone has them on its part of the model."""
    model, optimizer = build(plugin_overrides=RULES, plugin_log_updates=True, weight_decay=0.0)
    step(model, optimizer)
    log = optimizer.update_log
    bound = log.bound()
    found = log.take()
    numbers = {name: values["numel"] for name, values in found["optimizers"].items()}
    assert numbers == {"s3": 1230, "adamw": 600, "lion": 20}
    assert found["all"]["numel"] == sum(numbers.values())
    lion = found["optimizers"]["lion"]
    assert lion["mean_abs"] == lion["max_abs"] == lion["rms"] == 1.0
    assert found["all"]["max_abs"] == max(v["max_abs"] for v in found["optimizers"].values())
    total = sum(v["mean_abs"] * v["numel"] for v in found["optimizers"].values())
    assert found["all"]["mean_abs"] == pytest.approx(total / 1850)
    # The first update of AdamW is the gradient's sign, and it alone may exceed 1 afterwards.
    assert found["optimizers"]["adamw"]["mean_abs"] == pytest.approx(1.0, abs=1e-4)
    assert bound == inner(optimizer).algorithm_of({"algorithm": "adamw"}).description.bound(
        beta1=0.8, beta2=0.95, clip_update=None
    )
    other, its = build(plugin_log_updates=True)
    step(other, its)
    assert "optimizers" not in its.update_log.take()


REFUSED = [
    (["*2.weight: optimizer=adamw"], "no trainable parameter .* matches '\\*2.weight'"),
    (["*1.weight: optimizer=adamx"], "'\\*1.weight' sets optimizer='adamx', which is no optimizer"),
    (["*1.weight: optimizer=adamw p=2"], "sets p=2.0, which is never read.* AdamW has beta1"),
    (["*1.weight: optimizer=adamw beta1=2"], r"sets beta1=2.0: .*must be in \[0, 1\)"),
    (["*1.weight: lr=fast"], "'lr=fast' is neither a number nor true, false or none"),
    (["*1.weight optimizer=adamw"], "a rule is 'PATTERN: NAME=VALUE ...'"),
    (["*1.weight:"], "a rule is 'PATTERN: NAME=VALUE ...'"),
    (["*1.weight: lr=1 lr=2"], "'lr=2' is given twice"),
    (["*: lr=1", "*: beta=0.5"], "two rules for the pattern '\\*'"),
    ("*1.weight: lr=1", "must be a list of texts"),
    (
        ["*1.*: optimizer=adamw", "*.weight: optimizer=lion"],
        r"'\*1\.\*' and .*'\*\.weight' both match .*1\.weight, and both set optimizer",
    ),
    (
        ["*1.*: optimizer=adamw", "*.weight: beta=0.5"],
        r"'\*\.weight' sets s3_beta for .*1\.weight, which another override gives to AdamW",
    ),
]


@pytest.mark.parametrize(("rules", "why"), REFUSED)
@on_ranks(2)
def test_what_cannot_be_is_an_error_on_all_ranks(rules, why):
    with pytest.raises(ValueError, match=why):
        build(plugin_overrides=rules)


@pytest.mark.parametrize("rules", [REFUSED[0][0], REFUSED[-1][0]])
@on_ranks(2)
def test_what_only_the_model_shows_is_said_by_one_rank(rules):
    from megatron_s3.mcore.refusal import AllRanksError

    with pytest.raises(AllRanksError) as raised:
        build(plugin_overrides=rules)
    assert raised.value.speaker == 0


@on_ranks(1)
def test_rules_are_for_the_plugins_optimizers():
    from megatron.core.optimizer import OptimizerConfig

    with pytest.raises(ValueError, match=r"plugin_overrides does nothing with optimizer='adam'"):
        OptimizerConfig(optimizer="adam", plugin_overrides=RULES)
    assert OptimizerConfig(optimizer="s3", plugin_overrides=RULES).plugin_overrides == RULES


@on_ranks(2)
def test_both_copies_of_a_tied_embedding_have_one_optimizer():
    """The last stage's copy has another name: a rule knows that, a ParamKey of a program not."""
    from megatron.core import parallel_state
    from megatron.core.optimizer import ParamKey

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)

    def stage() -> torch.nn.Module:
        torch.manual_seed(0)
        table = torch.nn.Linear(8, 8, bias=False)
        table.weight.shared = table.weight.shared_embedding = True
        if torch.distributed.get_rank():
            return torch.nn.ModuleDict({"output_layer": table})
        words = torch.nn.ModuleDict({"word_embeddings": table})
        return torch.nn.ModuleDict({"embedding": words})

    rule = ["*word_embeddings*: optimizer=adamw"]
    _, optimizer = build(plugin_overrides=rule, overrides={}, model=stage(), sharded=False)
    owners = {g["algorithm"] for g in inner(optimizer).param_groups if g["params"]}
    assert owners == {"adamw"}
    for values in ({"optimizer": "adamw"}, {"lr": 0.01}):
        with pytest.raises(
            ValueError, match=r"word_embeddings\.weight and .*output_layer\.weight d"
        ):
            build(overrides={ParamKey(name="*word_emb*"): values}, model=stage(), sharded=False)
    both = ParamKey(name=("*word_embeddings*", "*output_layer*"))
    build(overrides={both: {"optimizer": "adamw"}}, model=stage(), sharded=False)


def saved_groups(*algorithms: str, **more: object) -> dict:
    groups = [{"algorithm": name, "p": 3.0} for name in algorithms]
    groups[-1] |= more
    return {"optimizer": {"param_groups": groups}}


@pytest.mark.parametrize(
    ("asked", "saved"),
    [
        (saved_groups("s3", "adamw", pattern="*a"), saved_groups("s3")),
        (saved_groups("s3"), saved_groups("s3", "adamw", pattern="*a")),
        (saved_groups("s3", "adamw", pattern="*a"), saved_groups("s3", "adamw", pattern="*b")),
        (saved_groups("s3", "adamw", pattern="*a"), saved_groups("s3", "lion", pattern="*a")),
        (saved_groups("s3", "s3", pattern="*a", p=2.0), saved_groups("s3", "s3", pattern="*b")),
    ],
    ids=["plain", "into plain", "another pattern", "another optimizer", "another p"],
)
@on_ranks(1)
def test_a_program_is_told_what_another_mixture_saved(asked, saved, tmp_path):
    from megatron_s3.mcore.checkpoint import library
    from tests.mcore.checkpoints import write

    library._common = lambda folder: saved
    folder = write(tmp_path, 3) / "iter_0000003"
    with pytest.raises(ValueError, match=r"iter_0000003 was saved with .*s3.*, and this run has"):
        library.load(lambda *rest, **kwargs: "loaded", asked, folder)
    library._common = lambda folder: asked
    assert library.load(lambda *rest, **kwargs: "loaded", asked, folder) == "loaded"


# ---- the trainer --------------------------------------------------------------------------------

EMBEDDINGS = "*word_embeddings*: optimizer=adamw lr=0.0003 beta2=0.99"
TRAINED = [
    *["--optimizer", "s3", "--plugin-overrides", EMBEDDINGS],
    *["*linear_proj*: optimizer=lion weight_decay=0.2", "*linear_fc1.weight: beta=0.8 p=2"],
]
SAVE = ["--save-interval", "3"]
SHARDED = ["--bf16", "--use-distributed-optimizer"]
RESHARDABLE = [*SHARDED, "--dist-ckpt-optim-fully-reshardable"]
EXPERTS = ["--num-experts", "2", "--expert-model-parallel-size", "2", "--no-bias-gelu-fusion"]
OFFLOADED = ["--optimizer-cpu-offload", "--optimizer-offload-fraction", ".5"]
LAYOUTS = {
    "dp2 bf16 sharded": (2, SHARDED),
    "dp2 bf16 sharded, reshardable": (2, RESHARDABLE),
    "dp2 bf16": (2, ["--bf16"]),
    "1 fp32": (1, []),
    "dp2 precision-aware": (2, [*SHARDED, "--use-precision-aware-optimizer"]),
    "tp2": (2, [*RESHARDABLE, "--tensor-model-parallel-size", "2"]),
    "pp2": (2, [*SHARDED, "--pipeline-model-parallel-size", "2"]),
    "overlapped": (2, [*SHARDED, "--overlap-grad-reduce", "--overlap-param-gather"]),
    "experts": (2, [*SHARDED, *EXPERTS]),
    "offloaded": (2, [*SHARDED, "--use-precision-aware-optimizer", *OFFLOADED]),
    "torch's format": (2, [*SHARDED, "--ckpt-format", "torch"]),
    "torch FSDP2": (2, ["--use-torch-fsdp2", "--untie-embeddings-and-output-weights"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", brief(LAYOUTS, *list(LAYOUTS)[:3], "pp2"))
def test_a_run_resumes_bitwise(layout: str, tmp_path: Path) -> None:
    ranks, flags = LAYOUTS[layout]
    through, resumed = tmp_path / "through", tmp_path / "resumed"
    flags = [*TRAINED, *flags, *SAVE]
    one = train(*flags, "--save", through, ranks=ranks)
    two = train(*flags, "--load", through, "--ckpt-step", 3, "--save", resumed, ranks=ranks)
    if "torch" not in flags:  # whose files are compared by their losses
        assert_bitwise_equal(tensors(through), tensors(resumed))
    assert one.losses_after(3) == two.losses_after(3) != {}


@pytest.fixture(scope="module")
def dp2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("several")
    train(*TRAINED, *RESHARDABLE, *SAVE, "--save", directory, ranks=2)
    return directory


AT_ONCE = ["--ckpt-step", 3, "--ckpt-convert-format", "torch_dist", "--ckpt-convert-save"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", brief([1, 4], 1))
def test_another_number_of_ranks_loads_bitwise(ranks: int, dp2: Path, tmp_path: Path) -> None:
    """Loaded and saved again without a step; each parameter has its own optimizer's states."""
    train(*TRAINED, *RESHARDABLE, "--load", dp2, *AT_ONCE, tmp_path, ranks=ranks)
    saved = tensors(dp2, 3)
    assert_bitwise_equal(saved, tensors(tmp_path / "torch_dist", 3))
    second = {n: t for n, t in saved.items() if ".exp_pnorm_or_exp_avg_sq." in n}
    assert {n.rpartition("exp_avg_sq.")[2] for n, t in second.items() if not t.any()} == {
        "decoder.layers.self_attention.linear_proj.weight",
        "decoder.layers.self_attention.linear_proj.bias",
    }


@pytest.mark.slow
def test_a_conversion_is_refused_and_the_weights_are_exported(
    dp2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_s3.checkpoints import convert, export

    for to in ("adam", "s3"):
        assert convert.main([str(dp2), str(tmp_path / to), "--to", to]) == 2
        said = capsys.readouterr().err
        assert "settings of their own (s3 and " in said and "adamw" in said
    assert not list(tmp_path.iterdir())
    assert export.main([str(dp2), str(tmp_path / "hf")]) == 0


OTHERS = {
    "plain S3": ["--optimizer", "s3"],
    "another pattern": ["--optimizer", "s3", "--plugin-overrides", "*embedding*: optimizer=adamw"],
    "another optimizer": [
        *[
            text.replace("optimizer=adamw lr=0.0003 beta2", "optimizer=nadam beta2")
            for text in TRAINED
        ]
    ],
    "AdamW": ["--optimizer", "adamw"],
    "another p": [text.replace("beta=0.8 p=2", "beta=0.8") for text in TRAINED],
}


@pytest.mark.slow
@pytest.mark.parametrize("other", brief(OTHERS, "plain S3", "another pattern"))
def test_a_run_with_other_optimizers_is_refused(other: str, dp2: Path) -> None:
    run = train(*OTHERS[other], *RESHARDABLE, "--load", dp2, ranks=2, check=False)
    assert run.returncode and not run.trained
    assert "was saved" in run.error and "Nothing was loaded. Resume with" in run.error
    if other != "AdamW":
        assert "adamw for '*word_embeddings*'" in run.error


@pytest.mark.slow
def test_a_mixed_run_does_not_take_what_plain_s3_saved(tmp_path: Path) -> None:
    train("--optimizer", "s3", *SHARDED, *SAVE, "--save", tmp_path, ranks=2)
    run = train(*TRAINED, *SHARDED, "--load", tmp_path, ranks=2, check=False)
    assert run.returncode and not run.trained
    assert "was saved with s3, and this run has s3 and" in run.error


@pytest.mark.slow
def test_another_rate_of_a_group_is_this_runs_and_is_said(dp2: Path) -> None:
    flags = [text.replace("lr=0.0003", "lr=0.0001") for text in TRAINED]
    run = train(*flags, *RESHARDABLE, "--load", dp2, "--ckpt-step", 3, ranks=2)
    assert any("lr=0.0003" in line and "the run continues" in line for line in run.said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["*a*: optimizer=adamx"], "error: --plugin-overrides '*a*' sets optimizer='adamx', which"),
        (
            ["*a*: optimizer=adamw p=2"],
            "error: --plugin-overrides '*a*' sets p=2.0, which is never",
        ),
        (["*a*: optimizer=adamw", "--use-megatron-fsdp"], "error: the optimizers s3 and adamw in"),
        (
            ["*a*: optimizer=adamw", "--optimizer", "adam"],
            "error: --plugin-overrides does nothing with --optimizer adam",
        ),
        (
            [
                *["*a*: optimizer=adamw", "--use-precision-aware-optimizer"],
                *["--use-distributed-optimizer", "--exp-avg-dtype", "bf16", "--s3-beta", "0.9"],
            ],
            "error: --exp-avg-dtype bf16: AdamW keeps exp_avg in float32",
        ),
    ],
)
def test_the_trainer_refuses_before_a_model_is_built(flags: list[str], message: str) -> None:
    run = train("--optimizer", "s3", "--plugin-overrides", *flags, ranks=2, check=False)
    assert run.returncode == 2 and run.error.startswith(message), run.log[-3000:]
