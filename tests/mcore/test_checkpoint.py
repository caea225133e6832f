"""What is verified of a checkpoint is what is read: from the flags to the files."""

import contextlib
import io
import json
import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.mcore.checkpoints import RATES, TRACKER, damage, flags, read, write
from tests.mcore.library import build, globally, on_ranks


def refusal(folder: Path, args: Namespace) -> str:
    with pytest.raises(ValueError) as error:
        read(folder, args)
    return str(error.value)


@on_ranks(1)
def test_the_iteration_that_is_read_is_the_one_that_was_verified(tmp_path):
    load = write(tmp_path, 3, 6, tracker="6")
    assert read(load, flags()) == (6, None)
    assert read(load, flags(ckpt_step=3)) == (3, None)
    damage(load / "iter_0000006")
    said = refusal(load, flags())
    assert "iter_0000006/__0_0.distcp is damaged" in said
    assert "Choose an iteration with --ckpt-step; complete: 3." in said
    assert read(load, flags(ckpt_step=3)) == (3, None)
    # The tracker file is not needed to read what is named.
    (load / TRACKER).unlink()
    assert read(load, flags(ckpt_step=3)) == (3, None)
    assert "complete: 3, 6" in refusal(load, flags())
    assert f"there is no {load}/iter_0000005" in refusal(load, flags(ckpt_step=5))


@on_ranks(1)
def test_newer_iterations_are_named_where_there_are_some(tmp_path):
    load = write(tmp_path, 3, 6, tracker="6")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert read(load, flags()) == (6, None)
    assert "newer ones" not in said.getvalue()
    (load / TRACKER).write_text("3")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert read(load, flags()) == (3, None)
    assert (
        "names; newer iterations are complete: 6 (choose one with --ckpt-step)\n" in said.getvalue()
    )


GLOBAL = {"non_persistent_ckpt_type": "global"}


@on_ranks(1)
def test_of_non_persistent_checkpoints_what_is_read_is_verified(tmp_path):
    load = write(tmp_path, 3, 6, tracker="6")
    # There is none: the persistent one is read, and verified.
    assert read(load, flags(**GLOBAL)) == (6, None)
    damage(load / "iter_0000006")
    assert "iter_0000006/__0_0.distcp is damaged" in refusal(load, flags(**GLOBAL))
    # A newer one comes before it, and is verified.
    elsewhere = write(load / "non_persistent", 8, tracker="8")
    assert read(load, flags(**GLOBAL)) == (8, "global")
    assert read(load, flags(ckpt_step=8, **GLOBAL)) == (8, "global")
    # What is named comes before a newer one.
    assert read(load, flags(ckpt_step=3, **GLOBAL)) == (3, None)
    damage(elsewhere / "iter_0000008")
    said = refusal(load, flags(**GLOBAL))
    assert f"{elsewhere}/iter_0000008/__0_0.distcp is damaged" in said
    assert "complete: 3, 6" in said
    (elsewhere / TRACKER).write_text("9")
    assert f"names iteration 9, and there is no {elsewhere}" in refusal(load, flags(**GLOBAL))
    (elsewhere / TRACKER).write_text("?")
    assert "names '?' instead of an iteration" in refusal(load, flags(**GLOBAL))
    # An older one does not.
    write(elsewhere, 5, tracker="5")
    write(load, 6)
    assert read(load, flags(**GLOBAL)) == (6, None)
    # Another place for them.
    other = write(load / "other", 9, tracker="9")
    args = flags(non_persistent_global_ckpt_dir=str(other), **GLOBAL)
    assert read(load, args) == (9, "global")
    damage(other / "iter_0000009")
    assert f"{other}/iter_0000009" in refusal(load, args)


@on_ranks(1)
def test_beside_local_checkpoints_the_persistent_one_is_verified(tmp_path):
    load = write(tmp_path, 6, tracker="6")
    damage(load / "iter_0000006")
    args = flags(non_persistent_ckpt_type="local")
    for newest, chosen in ((-1, None), (5, None), (6, 6), (8, 8)):
        context = {"local_checkpoint_manager": Namespace(find_latest=lambda newest=newest: newest)}
        if chosen:
            assert read(load, args, context) == (chosen, "local")
        else:
            with pytest.raises(ValueError, match=r"iter_0000006/__0_0\.distcp is damaged"):
                read(load, args, context)


@on_ranks(1)
def test_a_detected_format_is_the_files(tmp_path):
    """An unfinished torch_dist checkpoint has an index, as a finished torch_dcp one."""
    load = write(tmp_path, 6, tracker="6")
    args = flags(auto_detect_ckpt_format=True)
    assert read(load, args) == (6, None)
    folder = load / "iter_0000006"
    index = dcp.FileSystemReader(folder).read_metadata()
    for name in ("metadata.json", "checksums.sha256"):
        (folder / name).unlink()
    assert read(load, args) == (6, None)  # torch_dcp's
    index.mcore_data = {}
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    assert "metadata.json is missing: the save was not finished" in refusal(load, args)


@on_ranks(1)
def test_all_that_is_read_of_an_iteration_is_of_the_same(tmp_path):
    """Where Megatron looks the iteration up again, too: of the optimizer in the format torch."""
    from megatron.training import checkpointing

    from megatron_s3.mcore.checkpoint import loading

    load, found = write(tmp_path, 3, 6, tracker="6"), []
    tracker = str(load / TRACKER)

    def original(model, optimizer, scheduler, load_arg="load", **kwargs):
        found.append(checkpointing.read_metadata(tracker))
        found.append((args.ckpt_step, args.non_persistent_ckpt_type))

    def loaded(**other):
        nonlocal args
        args = flags(load=str(load), **other)
        before = dict(vars(args))
        found.clear()
        with globally(args):
            loading.load_checkpoint(original, [], None, None)
        assert vars(args) == before, "what was chosen stays in the arguments, and is saved"
        return found[0]

    args = None
    assert loaded() == (6, False)
    assert loaded(ckpt_step=3) == (3, False)
    (load / TRACKER).write_text("release")
    (load / "release").mkdir()
    assert loaded() == (0, True)
    assert loaded(ckpt_step=3) == (3, False)
    # Killed between the end of its first save and the tracker file.
    (load / TRACKER).unlink()
    (load / "iter_0000006" / "metadata.json").unlink()
    assert loaded() == (3, False)
    # Which --pretrained-checkpoint would pass over.
    with pytest.raises(ValueError, match=r"--pretrained-checkpoint would .*: 3\. Nothing"):
        loaded(pretrained_checkpoint=str(load))
    pretrained = write(load / "pretrained", 9, tracker="9")
    (load / TRACKER).write_text("3")
    assert loaded(pretrained_checkpoint=str(pretrained)) == (3, False)


@pytest.mark.parametrize("form", ["torch_dcp", "fsdp_dtensor"])
@on_ranks(1)
def test_an_asynchronous_save_is_sealed_when_it_has_ended(form, tmp_path):
    from megatron_s3.mcore.checkpoint import saving
    from megatron_s3.storage import layout

    folder = tmp_path / "iter_0000006"
    args = flags(save=str(tmp_path), ckpt_format=form)
    state = {"weight": torch.ones(70)}
    for _ in range(2):  # written over, the second time
        with globally(args):
            saving.save_checkpoint(lambda iteration: None, 6)  # scheduled
        assert not (folder / layout.SEAL).exists()
        assert not (folder / layout.INDEX).exists()
        dcp.save(state, checkpoint_id=folder, no_dist=True)
        with saving.open_file(open, str(tmp_path / TRACKER), "w") as file:
            file.write("6")
        assert (folder / layout.SEAL).read_text().split()[1:] == [layout.INDEX]
        assert read(tmp_path, flags(ckpt_format=form)) == (6, None)


@pytest.mark.parametrize("optimizer", ["s3", "adam"])
@on_ranks(1)
def test_other_rates_are_refused_before_anything_is_read_unless_it_is_said_whose_count(optimizer):
    from megatron_s3.mcore.checkpoint import differences

    def judge(now: dict, then: dict = RATES, **other) -> None:
        args = flags(optimizer=optimizer, **RATES | now, **other)
        differences.compare_rates("d", args, Namespace(optimizer=optimizer, **then))

    judge({})
    for name, value in (("lr", 1e-3), ("min_lr", 0.0), ("decoupled_lr", 1e-3)):
        flag = "--" + name.replace("_", "-")
        with pytest.raises(ValueError) as error:
            judge({name: value})
        assert str(error.value).startswith(
            f"d was saved with {flag} {RATES[name]}, and this run has {flag} {value}. "
        )
        assert "--override-opt_param-scheduler, or the checkpoint's with --use" in str(error.value)
        judge({name: value}, override_opt_param_scheduler=True)
        judge({name: value}, use_checkpoint_opt_param_scheduler=True)


@on_ranks(1)
def test_what_is_finetuned_goes_on_with_nothing_of_the_run_before(tmp_path):
    """Whose optimizer and rates the checkpoint's are does not matter then, nor do its spikes."""
    from megatron_s3.mcore import state
    from megatron_s3.mcore.checkpoint import loading

    load = write(tmp_path, 3, tracker="3")
    saved = Namespace(optimizer="adam", s3_spikes={"of": "that run"}, **RATES)

    def loaded(**other):
        state.running().spikes = None
        args = flags(optimizer="s3", **RATES | other)
        original = lambda load_dir, args, **kwargs: ({"args": saved}, "", False, None)
        loading.load_base_checkpoint(original, load, args, rank0=True)
        return state.running().spikes

    assert loaded(finetune=True, no_load_optim=False, lr=1e-3) is None
    assert loaded(no_load_optim=True, lr=1e-3) == {"of": "that run"}
    with pytest.raises(ValueError, match=r"saved with --lr 0\.003"):
        loaded(no_load_optim=False, lr=1e-3)
    with pytest.raises(ValueError, match="was saved by --optimizer adam"):
        loaded(no_load_optim=False)


@on_ranks(1)
def test_whose_state_it_is_is_compared_where_there_is_one():
    from megatron_s3.mcore.checkpoint import differences
    from megatron_s3.optimizers.description import FORMAT

    def judge(**saved):
        differences.compare_optimizers(
            "d", flags(optimizer="s3"), Namespace(optimizer="s3", **saved)
        )

    judge(s3_p=None, s3_format=FORMAT)
    for saved, fault in (
        ({"s3_p": 2.0}, r"saved with --s3-p 2\.0; its state means nothing with --s3-p 3\.0"),
        ({"s3_format": FORMAT + 1}, "saved by a newer megatron_s3, in format"),
    ):
        with pytest.raises(ValueError, match=fault):
            judge(**saved)


@on_ranks(1)
@pytest.mark.parametrize("part", ["optim", "rng"])
def test_what_was_not_saved_is_not_loaded(part, tmp_path):
    from megatron_s3.mcore.checkpoint import loading

    load = write(tmp_path, 3, tracker="3")
    saved = Namespace(optimizer="s3", **RATES | {f"no_save_{part}": True})

    def loaded(**other):
        args = flags(**{"optimizer": "s3", "no_load_optim": False, "no_load_rng": False} | other)
        vars(args).update(RATES)
        original = lambda load_dir, args, **kwargs: ({"args": saved}, "", False, None)
        loading.load_base_checkpoint(original, load, args, rank0=True)

    with pytest.raises(ValueError) as error:
        loaded()
    assert f"was saved with --no-save-{part} and holds no " in str(error.value)
    assert f"Add --no-load-{part} to start without it" in str(error.value)
    loaded(**{f"no_load_{part}": True})
    loaded(finetune=True)


@on_ranks(1)
def test_formats_that_are_read_once_are_verified_then(tmp_path):
    from megatron_s3.mcore.checkpoint import loading

    def refusal(load, form):
        with pytest.raises(ValueError) as error:
            loading.load_base_checkpoint(None, load, flags(ckpt_format=form), rank0=False)
        return str(error.value)

    load = write(tmp_path / "torch_dcp", 6, tracker="6")
    damage(load / "iter_0000006")
    assert "__0_0.distcp is damaged" in refusal(load, "torch_dcp")
    other = tmp_path / "torch/iter_0000006/mp_rank_01/model_optim_rng.pt"  # of another rank
    other.parent.mkdir(parents=True)
    torch.save({"weight": torch.ones(3)}, other)
    (tmp_path / "torch" / TRACKER).write_text("6")
    said = refusal(tmp_path / "torch", "torch")
    assert "iter_0000006/mp_rank_00/model_optim_rng.pt is missing" in said


@on_ranks(2)
def test_a_fault_of_any_rank_is_an_error_on_all():
    from megatron_s3.mcore.all_ranks import raise_first

    for rank in range(2):
        with pytest.raises(ValueError, match="found by one"):
            raise_first("found by one" if torch.distributed.get_rank() == rank else None)
    raise_first(None)


@on_ranks(2)
def test_each_rank_verifies_a_share_and_all_is_verified(tmp_path):
    from megatron_s3.storage import checksums

    folder, first = tmp_path / "iter_0000003", torch.distributed.get_rank() == 0
    dcp.save({name: torch.full((70,), 3) for name in "abcd"}, checkpoint_id=folder)
    if first:
        (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
        checksums.seal(folder)
        (tmp_path / TRACKER).write_text("3")
    torch.distributed.barrier()
    files, value = sorted(folder.glob("*.distcp")), torch.full((70,), 3).numpy().tobytes()
    assert len(files) == 2

    def said(**other: object) -> str:
        torch.distributed.barrier()
        result = refusal(tmp_path, flags(**other))
        torch.distributed.barrier()
        return result

    assert read(tmp_path, flags()) == (3, None)
    for path in files:
        content = path.read_bytes()
        places = [at for at in range(len(content)) if content.startswith(value, at)]
        assert len(places) == 2
        torch.distributed.barrier()
        for at in places:
            if first:
                path.write_bytes(content[:at] + b"\1" + content[at + 1 :])
            assert f"{path} is damaged" in said()
        if first:
            path.write_bytes(content[:-1])
        assert f"{path} is truncated: {len(content) - 1:,} bytes" in said(
            plugin_no_verify_checkpoint=True
        )
        if first:
            path.write_bytes(content)
    torch.distributed.barrier()
    assert read(tmp_path, flags()) == (3, None)


@on_ranks(1)
def test_how_loading_ends(tmp_path):
    from megatron_s3.mcore import state
    from megatron_s3.mcore.checkpoint import loading

    load, (model, optimizer) = write(tmp_path, 3, tracker="3"), build()

    def loaded(end: object = None, unlike: tuple = ()) -> None:
        def original(model, optimizer, scheduler):
            state.running().unlike.extend(unlike)
            if end is not None:
                raise end

        with globally(flags(load=str(load))):
            loading.load_checkpoint(original, [model], optimizer, None)

    loaded()
    with pytest.raises(ValueError, match="could not be loaded, for the reason that Megatron"):
        loaded(SystemExit())
    with pytest.raises(SystemExit, match="3"):
        loaded(SystemExit(3))
    with pytest.raises(ValueError, match="was saved with another schedule"):
        loaded(AssertionError("OptimizerParamScheduler: class input value 1"))
    with pytest.raises(AssertionError, match="of another kind"):
        loaded(AssertionError("of another kind"))
    with pytest.raises(
        ValueError, match=r"of module\.module\.0\.weight differ .*\(1 such parameters on"
    ):
        loaded(unlike=[next(model.parameters())])
    loaded()  # which does not remember it
