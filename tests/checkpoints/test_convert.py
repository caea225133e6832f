"""AdamW's checkpoints under S3 and back, with the real trainer, and what is refused."""

import contextlib
import dataclasses
import io
import json
import shlex
import shutil
import sys
import threading
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_s3.checkpoints import convert, direction, groups, rates, rewriting, transfer
from megatron_s3.launch.args import LR_FACTOR, translate
from megatron_s3.mcore.checkpoint import read
from megatron_s3.optimizers import S3, NAdam
from megatron_s3.optimizers.description import FORMAT
from megatron_s3.optimizers.from_adam import FromAdam, FromAverage
from megatron_s3.rules.roots import square_root
from megatron_s3.storage import copying
from megatron_s3.storage.index import read as read_index
from tests.harness.trainer import assert_bitwise_equal, brief, tensors, train

GROUP = {
    "wd_mult": 1.0,
    "max_lr": 3e-4,
    "lr": 3e-4,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "bias_correction": True,
    "step": 100.0,
}
SHARDED = "optimizer.state.{}.decoder.weight"
BUCKET = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(x).bucket_idx_0.{}"


def arguments(**other: object) -> Namespace:
    values = {
        "optimizer": "adam",
        "lr": 3e-4,
        "min_lr": 3e-5,
        "weight_decay": 0.1,
        "clip_grad": 1.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_eps": 1e-8,
        "use_distributed_optimizer": True,
    }
    return Namespace(**values | other)


def common(**other: object) -> dict:
    return {
        "args": arguments(),
        "iteration": 100,
        "opt_param_scheduler": {"max_lr": 3e-4, "min_lr": 3e-5, "start_wd": 0.1, "num_steps": 9},
        "optimizer": {"optimizer": {"param_groups": [dict(GROUP)]}},
    } | other


def write(folder: Path, state: dict[str, torch.Tensor], objects: dict, files: int = 1) -> Path:
    """A checkpoint in the format torch_dist, as an older Megatron lays it out, without Megatron."""
    iteration = folder / "iter_0000100"
    writer = dcp.FileSystemWriter(iteration, thread_count=files)
    dcp.save(state, storage_writer=writer, no_dist=True)
    torch.save(objects, iteration / "common.pt")
    (iteration / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (folder / "latest_checkpointed_iteration.txt").write_text("100")
    return folder


def states(shape: tuple[int, ...] = (64, 3), dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(0)
    m, v = torch.randn(2, *shape, generator=generator).to(dtype)
    weight = torch.randn(shape, generator=generator)
    return {
        "decoder.weight": weight.bfloat16(),
        SHARDED.format("param"): weight,
        SHARDED.format("exp_avg"): m * 1e-3,
        SHARDED.format("exp_avg_sq"): v.square() * 1e-6,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_follow_the_rule_and_weights_stay(dtype: torch.dtype, tmp_path: Path) -> None:
    before = states(dtype=dtype)
    given = write(tmp_path / "adamw", before, common())
    kept = {path: path.read_bytes() for path in given.rglob("*") if path.is_file()}
    record = convert.convert(given, tmp_path / "s3", "s3")
    after = tensors(tmp_path / "s3", 100)
    assert set(after) == {name.replace("exp_avg_sq", "exp_pnorm") for name in before}
    for name in ("decoder.weight", SHARDED.format("param")):
        assert torch.equal(after[name], before[name])
    m, v = (before[SHARDED.format(name)].float() for name in ("exp_avg", "exp_avg_sq"))
    assert torch.equal(after[SHARDED.format("exp_avg")], (m / (1 - 0.9**100)).to(dtype))
    wanted = square_root(v / (1 - 0.95**100)).to(dtype)
    assert torch.equal(after[SHARDED.format("exp_pnorm")], wanted)
    assert kept == {path: path.read_bytes() for path in given.rglob("*") if path.is_file()}
    assert record == json.loads((tmp_path / "s3/convert.json").read_text()) | {
        "changed": record["changed"]
    }

    convert.convert(tmp_path / "s3", tmp_path / "back", "adam")
    back = tensors(tmp_path / "back", 100)
    # Two roundings each of r and m, and a square.
    rtol = 8 * torch.finfo(dtype).eps
    for name in before:
        torch.testing.assert_close(back[name], before[name], rtol=rtol, atol=0)


def test_rates_stamps_and_steps_are_the_targets(tmp_path: Path) -> None:
    given = write(tmp_path / "adamw", states(), common())
    convert.convert(given, tmp_path / "s3", "s3", lr_factor=10, hyperparameters={"p": 2.0})
    folder = tmp_path / "s3/iter_0000100"
    found = torch.load(folder / "common.pt", weights_only=False)
    args = found["args"]
    assert (args.optimizer, args.lr, args.min_lr) == ("s3", 3e-3, 3e-4)
    assert (args.weight_decay, args.clip_grad, args.s3_p, args.s3_beta) == (0.01, 0.0, 2.0, 0.95)
    assert found["iteration"] == 100
    schedule = {"max_lr": 3e-3, "min_lr": 3e-4, "start_wd": 0.01, "num_steps": 9}
    assert found["opt_param_scheduler"] == schedule
    (group,) = found["optimizer"]["optimizer"]["param_groups"]
    assert group == {
        **{"wd_mult": 1.0, "max_lr": 3e-3, "lr": 3e-3, "weight_decay": 0.01, "step": 100},
        **{h.name: h.default for h in S3.description.hyperparameters},
        **{"p": 2.0, "algorithm": "s3", "format": FORMAT},
    }

    record = convert.convert(tmp_path / "s3", tmp_path / "back", "adam")
    assert record["flags"].endswith("--clip-grad 1 --adam-beta1 0.9 --adam-beta2 0.95")
    back = torch.load(tmp_path / "back/iter_0000100/common.pt", weights_only=False)
    (group,) = back["optimizer"]["optimizer"]["param_groups"]
    assert GROUP.items() <= group.items()
    assert vars(arguments()).items() <= vars(back["args"]).items()
    assert "algorithm" not in group and "beta" not in group


def corrections(settings: transfer.Settings) -> list[float]:
    return [change.correction for change in settings.states.values()]


def test_the_flags_to_resume_with_are_words_of_a_shell(tmp_path: Path, capsys) -> None:
    given = write(tmp_path / "adamw", states(), common())
    output = tmp_path / "it's S3"
    assert convert.main([str(given), str(output), "--to", "s3"]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1].partition("resume with ")[2])
    assert words[:4] == ["--load", str(output), "--optimizer", "s3"]


def test_every_rate_that_changes_is_said_with_its_flag(tmp_path: Path) -> None:
    """Megatron refuses to resume with another one of them."""
    more = {"decoupled_lr": 1e-3, "decoupled_min_lr": 1e-4, "lr_warmup_init": 0.0}
    more |= {"start_weight_decay": 0.01, "end_weight_decay": 0.2}
    linear = {"weight_decay_incr_style": "linear"}
    wanted = "--decoupled-lr 0.003 --decoupled-min-lr 0.0003"
    decays = "--start-weight-decay 0.0033333333333333335 --end-weight-decay 0.06666666666666667"
    for style, flags in (({}, wanted), (linear, f"{wanted} {decays}")):
        args = arguments(**more, **style)
        given = write(tmp_path / f"adamw{len(style)}", states(), common(args=args))
        record = convert.convert(given, tmp_path / f"s3-{len(style)}", "s3")
        assert record["flags"].endswith(f"--clip-grad 0 {flags}")
        assert record["changed"]["decoupled_lr"] == (1e-3, 3e-3)


def test_a_step_beside_the_groups_is_found_and_put_back() -> None:
    """torch's AdamW where the state is not sharded."""
    group = {k: v for k, v in GROUP.items() if k != "step"}
    optimizer = {"state": {"common_step": torch.tensor(7.0)}, "param_groups": [group]}
    given = {"args": arguments(use_distributed_optimizer=False), "optimizer": optimizer}
    there = direction.settings([given], "s3")
    assert (there.step, corrections(there)) == (7, [1 - 0.9**7, 1 - 0.95**7])
    new = groups.convert(given, there)
    assert "state" not in new["optimizer"] and new["optimizer"]["param_groups"][0]["step"] == 7
    back = groups.convert(new, direction.settings([new], "adam"))
    assert back["optimizer"]["state"] == {"common_step": torch.tensor(7.0)}


def test_an_exact_factor_needs_no_new_bytes() -> None:
    """After 400 updates 0.9**t is nothing to a float64's 1."""
    there = direction.settings([common(optimizer={"param_groups": [GROUP | {"step": 400}]})], "s3")
    assert corrections(there)[0] == 1
    assert not transfer.changes(SHARDED.format("exp_avg"), there)
    assert transfer.changes(SHARDED.format("exp_avg_sq"), there)


def test_rates_are_scaled_as_on_paper() -> None:
    assert 3e-4 * 10 != 3e-3
    assert rates.scaled(3e-4, 10.0) == 3e-3
    assert rates.over(0.1, 10.0) == 0.01
    assert rates.over(0.1, 3.0) == 0.1 / 3
    for value in (0.1, 0.01, 3e-4, 6e-4, 1.7e-5, 0.0):
        for factor in (3.0, 7.0, 10.0, 0.3):
            assert rates.scaled(rates.over(value, factor), factor) == value
            assert rates.over(rates.scaled(value, factor), factor) == value


def test_both_ways_to_s3_give_the_same_rates_for_the_same_factor(tmp_path: Path) -> None:
    """`args` for a launch, `convert` for a checkpoint: it resumes with the flags of either."""
    own = S3.description.from_adam
    assert (own.lr_factor, own.lr_factor_back) == (3, 10) and LR_FACTOR == "10"
    given = write(tmp_path / "adamw", states(), common(args=arguments(weight_decay=0.1)))
    launch = "--optimizer adam --lr 3e-4 --min-lr 3e-5 --weight-decay 0.1 --clip-grad 1.0"
    for factor in ("3", "10"):
        record = convert.convert(given, tmp_path / factor, "s3", lr_factor=float(factor))
        said = []
        for words in (record["flags"].split(), translate(launch, factor).text.split()):
            found = dict(zip(words[::2], words[1::2], strict=True))
            said.append(
                {name: float(found[f"--{name}"]) for name in ("lr", "min-lr", "weight-decay")}
            )
        assert said[0] == said[1]
    assert said[0] == {"lr": 3e-3, "min-lr": 3e-4, "weight-decay": 0.01}


def test_an_optimizer_is_known_by_its_description(tmp_path: Path, monkeypatch) -> None:
    """Nothing but that says how its state is made: here of NAdam, which has none."""
    half = FromAverage("exp_avg", lambda m, c: m / 2, lambda m, c: m * 2, ("{} / 2", "{} * 2"))
    same = FromAverage("exp_avg_sq", lambda v, c: v, lambda v, c: v, ("{}", "{}"))
    own = FromAdam({"exp_avg": half, "exp_avg_sq": same}, lr_factor=2.0, lr_factor_back=4.0)
    with_it = dataclasses.replace(NAdam.description, from_adam=own)
    monkeypatch.setattr(NAdam, "description", with_it)
    before = states()
    given = write(tmp_path / "adamw", before, common())
    assert "invalid choice" not in help_of("--to", "nadam")
    record = convert.convert(given, tmp_path / "nadam", "nadam")
    assert record["flags"].startswith("--optimizer nadam --lr 0.0006 --min-lr 6e-05 --weight-decay")
    name = SHARDED.format("exp_avg")
    assert_bitwise_equal(tensors(tmp_path / "nadam", 100), before | {name: before[name] / 2})
    found = torch.load(tmp_path / "nadam/iter_0000100/common.pt", weights_only=False)
    (group,) = found["optimizer"]["optimizer"]["param_groups"]
    assert group["algorithm"] == "nadam"
    assert group.keys() >= {h.name for h in with_it.hyperparameters}
    record = convert.convert(tmp_path / "nadam", tmp_path / "back", "adam")
    assert (record["changed"]["lr"], record["lr_factor"]) == ((0.0006, 0.00015), 4)
    assert_bitwise_equal(tensors(tmp_path / "back", 100), before)


def help_of(*argv: str) -> str:
    """What the command says to arguments that are not enough."""
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit):
        convert.main(list(argv))
    return said.getvalue()


def test_names_of_states() -> None:
    there = direction.settings([common()], "s3")
    assert transfer.state_of("chained_1." + SHARDED.format("exp_avg")) == "exp_avg"
    assert transfer.rename(BUCKET.format("exp_avg_sq"), there) == BUCKET.format("exp_pnorm")
    assert transfer.rename("decoder.exp_avg_sq", there) == "decoder.exp_avg_sq"
    assert transfer.state_of("optimizer.state.param.exp_avg_sq") == "param"


def test_memory_between_parameters_does_no_harm() -> None:
    there = direction.settings([common()], "s3")
    given = torch.tensor([-1.0, float("nan"), float("inf"), 0.0])
    new = transfer.convert_tensor(BUCKET.format("exp_avg_sq"), given, there)
    wanted = torch.tensor([0.0, float("nan"), float("inf"), 0.0])
    torch.testing.assert_close(new, wanted, equal_nan=True)


def error(*argv: str | Path) -> str:
    """What the command says on stderr, in one line."""
    with pytest.MonkeyPatch.context() as patch:
        said = io.StringIO()
        patch.setattr(sys, "stderr", said)
        assert convert.main([str(word) for word in argv]) == 2
    (line,) = said.getvalue().splitlines()
    return line


def test_what_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    given = write(tmp_path / "adamw", states(), common())
    output = tmp_path / "out"

    def refused(folder: Path = given, to: str = "s3") -> str:
        line = error(folder, output, "--to", to)
        assert not output.exists()
        assert not list(tmp_path.glob(".*.part"))
        return line

    assert "its state is of --optimizer adam already" in refused(to="adam")
    for name, args, said in (
        ("lion", arguments(optimizer="lion"), "neither AdamW's nor S3's"),
        ("none", arguments(no_save_optim=True), "--no-save-optim"),
        ("s3", arguments(optimizer="s3"), "its state is of --optimizer s3 already"),
    ):
        assert said in refused(write(tmp_path / name, states(), common(args=args)))
    two = {"param_groups": [GROUP, GROUP | {"step": 3}]}
    assert "the step counts [3, 100]" in refused(
        write(tmp_path / "two", states(), common(optimizer=two))
    )
    muon = {"param_groups": [GROUP, GROUP | {"algorithm": "s3"}]}
    assert "settings of their own (muon and s3), and" in refused(
        write(tmp_path / "muon", states(), common(args=arguments(optimizer="muon"), optimizer=muon))
    )
    l2 = {"param_groups": [GROUP | {"decoupled_weight_decay": False}]}
    assert "not AdamW" in refused(write(tmp_path / "l2", states(), common(optimizer=l2)))
    eight = states() | {SHARDED.format("exp_avg_sq"): torch.zeros(3, dtype=torch.uint8)}
    assert "--exp-avg-sq-dtype fp32 or bf16" in refused(write(tmp_path / "eight", eight, common()))
    half = states()
    del half[SHARDED.format("exp_avg_sq")]
    assert "exp_avg_sq are expected" in refused(write(tmp_path / "half", half, common()))

    class Unknown:
        pass

    globals()["Unknown"] = Unknown
    Unknown.__qualname__ = "Unknown"
    assert "Unknown" in refused(write(tmp_path / "unsafe", states(), common(more=Unknown())))

    output.mkdir()
    assert f"{output} exists" in error(given, output, "--to", "s3")
    output.rmdir()
    iteration = given / "iter_0000100"
    (tmp_path / "link").symlink_to(iteration)
    library = shutil.copytree(iteration, tmp_path / "library")
    for folder, inside in ((given, iteration), (iteration, tmp_path / "link"), (library, library)):
        assert "which is copied as a whole" in error(folder, inside / "out", "--to", "s3")
        assert {path.name for path in iteration.iterdir()} == {
            path.name for path in library.iterdir()
        }
    file = given / "iter_0000100/__0_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    assert f"{file} is truncated" in refused()
    file.write_bytes(b"\0" * len(content))
    assert f"{file} is damaged" in refused()
    file.rename(file.with_stem("other"))
    assert f"{file} is missing" in refused()
    (given / "iter_0000100/.metadata").unlink()
    assert ".metadata is missing" in refused()
    (given / "iter_0000100/metadata.json").unlink()
    assert "not a complete checkpoint" in refused()


def test_a_release_is_found_and_has_nothing_to_convert(tmp_path: Path) -> None:
    given = write(tmp_path / "adamw", states(), common())
    released = given / "release"
    (given / "iter_0000100").rename(released)
    (given / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert read.find(given) == read.find(released) == released
    for folder in (given, released):
        assert "is a release, from which Megatron loads the weights alone" in error(
            folder, tmp_path / "out", "--to", "s3"
        )
    assert "no iteration 100; it holds no iter_XXXXXXX" in error(
        given, tmp_path / "out", "--to", "s3", "--iteration", "100"
    )
    assert "is another iteration than --iteration 100" in error(
        released, tmp_path / "out", "--to", "s3", "--iteration", "100"
    )
    released.rename(given / "other")
    assert "names a release, but" in error(given, tmp_path / "out", "--to", "s3")


@pytest.mark.parametrize(
    "name", ["decoder.weight", *(SHARDED.format(f"exp_{it}") for it in ("avg", "pnorm"))]
)
def test_what_reads_back_wrongly_is_not_left(name: str, tmp_path: Path, monkeypatch) -> None:
    given = write(tmp_path / "adamw", states(), common())
    honest = rewriting.write

    def flipped(source, folder, settings, say):
        result = honest(source, folder, settings, say)
        (file,) = folder.glob("*.distcp")
        content = bytearray(file.read_bytes())
        places = read_index(folder).storage_data
        (place,) = (place for index, place in places.items() if index.fqn == name)
        content[content.find(b"/data/0FB", place.offset) + 200] ^= 1
        file.write_bytes(content)
        return result

    monkeypatch.setattr(rewriting, "write", flipped)
    with pytest.raises(convert.Mismatch):
        convert.convert(given, tmp_path / "s3", "s3")
    assert {path.name for path in tmp_path.iterdir()} == {"adamw"}


@pytest.mark.parametrize("call", [1, 5, 10])
def test_a_full_disk_is_called_so(call: int, tmp_path: Path, monkeypatch) -> None:
    given = write(tmp_path / "adamw", states(), common())
    honest, calls = copying.Writer.write, []

    def full(writer, data):
        calls.append(len(data))
        if len(calls) < call:
            return honest(writer, data)
        with Path("/dev/full").open("wb", buffering=0) as file, monkeypatch.context() as patch:
            patch.setattr(writer, "_file", file)
            return honest(writer, data)

    monkeypatch.setattr(copying.Writer, "write", full)
    assert "No space left on device" in error(given, tmp_path / "s3", "--to", "s3")
    assert {path.name for path in tmp_path.iterdir()} == {"adamw"}


def test_one_file_that_fails_ends_them_all(tmp_path: Path, monkeypatch) -> None:
    """The others' threads are waited for, and the first error is the one that is said."""
    given = write(tmp_path / "adamw", states(), common(), files=4)
    names = sorted(path.name for path in given.glob("*/*.distcp"))
    assert len(names) == 4
    honest, running = copying.Writer.write, threading.Barrier(4)
    begun, stopped = set(), []

    def fails(writer, data):
        name = Path(writer._file.name).name
        if name not in begun:
            begun.add(name)
            running.wait(60)
        if name == names[0]:
            raise OSError(28, "No space left on device")
        stopped.append(writer._stop.wait(60))
        return honest(writer, data)

    monkeypatch.setattr(copying.Writer, "write", fails)
    monkeypatch.setattr(read, "threads", lambda: 4)
    assert "No space left on device" in error(given, tmp_path / "s3", "--to", "s3")
    assert stopped and all(stopped)
    assert {path.name for path in tmp_path.iterdir()} == {"adamw"}


def test_a_killed_conversion_leaves_nothing_that_loads(tmp_path: Path, monkeypatch) -> None:
    """Nothing is cleaned up, as after kill -9 at the last moment before the verification."""
    given = write(tmp_path / "adamw", states(), common())
    monkeypatch.setattr(rewriting, "verify", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        convert.convert(given, tmp_path / "s3", "s3")
    (left,) = tmp_path.glob(".s3.*.part")
    assert not (tmp_path / "s3").exists()
    assert not (left / "latest_checkpointed_iteration.txt").exists()
    with pytest.raises(read.CheckpointError, match="it holds no checkpoint"):
        read.find(left)


BF16 = ["--bf16", "--use-distributed-optimizer"]
LAYOUTS = {
    "dp2, dp_reshardable": (2, BF16),
    "tp2, fully_reshardable": (
        2,
        [*BF16, "--dist-ckpt-optim-fully-reshardable", "--tensor-model-parallel-size", "2"],
    ),
    "pp2, dp_reshardable": (2, [*BF16, "--pipeline-model-parallel-size", "2"]),
    "1, fp32, not sharded": (1, []),
    "dp2, bf16, not sharded": (2, ["--bf16"]),
    "ep2, reshardable": (
        2,
        [
            *[*BF16, "--dist-ckpt-optim-fully-reshardable", "--num-experts", "2"],
            *["--expert-model-parallel-size", "2", "--no-bias-gelu-fusion"],
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", brief(LAYOUTS, "tp2, fully_reshardable"))
def test_the_trainer_resumes_what_was_converted(layout: str, tmp_path: Path) -> None:
    """AdamW for 2 steps, S3 for 2 from its converted state, and AdamW for 2 from S3's.

    What is resumed is what the conversion wrote: saved again without a step, it is the same bits.
    """
    ranks, flags = LAYOUTS[layout]
    adamw, s3, back, resumed = (tmp_path / name for name in ("adamw", "s3", "back", "resumed"))
    old = ["--optimizer", "adam", *flags, "--lr", "3e-4", "--weight-decay", "0.1"]
    saving = ["--save-interval", 2, "--save"]
    train(*old, *saving, adamw, ranks=ranks)
    record = convert.convert(adamw, s3, "s3", iteration=2)
    assert record["lr_factor"] == 3
    new = [*flags, *record["flags"].split()]
    run = train(*new, "--load", s3, *saving, resumed, ranks=ranks)
    assert set(run.losses) == {3, 5, 6}
    before, after = tensors(adamw, 2), tensors(s3, 2)
    for name, value in before.items():
        there = after[name.replace("exp_avg_sq", "exp_pnorm")]
        state = transfer.state_of(name)
        if state == "exp_avg":
            assert torch.equal(there, value / (1 - 0.9**2))
        elif state == "exp_avg_sq":
            assert torch.equal(there, square_root(value / (1 - 0.999**2)))
        else:
            assert torch.equal(there, value)
    again = ["--ckpt-convert-format", "torch_dist", "--ckpt-convert-save", tmp_path / "again"]
    train(*new, "--load", s3, *again, ranks=ranks)
    assert_bitwise_equal(after, tensors(tmp_path / "again/torch_dist", 2))

    convert.convert(resumed, back, "adam", iteration=4, lr_factor=3)
    run = train(*old, "--load", back, ranks=ranks)
    assert set(run.losses) == {5}  # 6 is the second line
