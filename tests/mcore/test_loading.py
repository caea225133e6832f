"""Loading, step by step: which folder and iteration, what is compared, how it ends."""

from argparse import Namespace

import pytest
import torch

from tests.mcore.checkpoints import RATES, TRACKER, damage, flags, read, write
from tests.mcore.library import build, globally, on_ranks

LOCAL = {"non_persistent_ckpt_type": "local"}
GLOBAL = {"non_persistent_ckpt_type": "global"}


@on_ranks(1)
def test_nothing_is_chosen_of_no_folder_or_an_object_store():
    from megatron_s3.mcore.checkpoint.choice import chosen

    for load_dir in (None, "msc://bucket/run"):
        args = flags(ckpt_step=3)
        with chosen(load_dir, args, None) as choice:
            assert choice is None and args.ckpt_step == 3


@on_ranks(1)
def test_a_tracker_file_that_cannot_be_read_is_an_error_on_all_ranks(tmp_path):
    (tmp_path / TRACKER).mkdir()
    with pytest.raises(ValueError, match="Is a directory"):
        read(tmp_path, flags())


@on_ranks(1)
def test_without_local_checkpoints_the_persistent_one_is_read(tmp_path):
    load = write(tmp_path, 6, tracker="6")
    for context in (None, {}):
        assert read(load, flags(**LOCAL), context) == (6, None)


@on_ranks(1)
def test_a_non_persistent_checkpoint_is_newer_than_a_release(tmp_path):
    (tmp_path / "release").mkdir()
    (tmp_path / TRACKER).write_text("release")
    write(tmp_path / "non_persistent", 8, tracker="8")
    assert read(tmp_path, flags(**GLOBAL)) == (8, "global")


def load_base(load, args, saved=None, release=False, inside=lambda: None):
    from megatron_s3.mcore.checkpoint import loading

    def original(load_dir, args, **kwargs):
        inside()
        return {"args": saved}, "", release, None

    loading.load_base_checkpoint(original, load, args, rank0=True)


@on_ranks(1)
def test_a_release_is_compared_with_nothing(tmp_path):
    load = write(tmp_path, 3, tracker="3")
    saved = Namespace(optimizer="adam", padded_vocab_size=384, **RATES)
    args = flags(optimizer="s3", no_load_optim=False, padded_vocab_size=512, **RATES)
    args.tensor_model_parallel_size = 4
    load_base(load, args, saved, release=True)
    with pytest.raises(ValueError, match="holds a vocabulary padded to 384"):
        load_base(load, args, saved)


@on_ranks(1)
def test_what_the_trainer_has_checked_is_not_checked_again_by_the_library(tmp_path):
    """Whose settings are its own: the trainer's arguments may leave the contents out."""
    from megatron_s3.mcore.checkpoint import library

    load = write(tmp_path, 3, tracker="3")
    damage(load / "iter_0000003")
    loads = lambda: library.load(lambda *rest: "loaded", {}, load / "iter_0000003")
    load_base(load, flags(plugin_no_verify_checkpoint=True), inside=loads)
    with pytest.raises(ValueError, match=r"__0_0\.distcp is damaged"):
        loads()


@pytest.mark.parametrize("form", ["torch_dist", "torch_dcp"])
@pytest.mark.parametrize("fsdp2", [False, True])
@on_ranks(1)
def test_steps_are_restored_where_megatron_does_not(fsdp2, form, tmp_path):
    from megatron_s3.mcore import torch_fsdp2

    restored = []
    torch_fsdp2.restore_step = restored.append
    load = write(tmp_path, 3, tracker="3")
    saved = Namespace(optimizer="s3", **RATES)
    args = flags(optimizer="s3", no_load_optim=False, ckpt_format=form, use_torch_fsdp2=fsdp2)
    vars(args).update(RATES)
    load_base(load, args, saved)
    assert len(restored) == (fsdp2 and form == "torch_dist")


def load_all(args, *rest, end=None, **kwargs):
    """Returns the iteration that Megatron reads."""
    from megatron_s3.mcore.checkpoint import loading

    def original(model, optimizer, scheduler, *rest, **kwargs):
        if end is not None:
            raise end
        return args.ckpt_step

    with globally(args):
        return loading.load_checkpoint(original, [], None, None, *rest, **kwargs)


@on_ranks(1)
def test_the_folder_is_the_one_that_megatron_is_told_of(tmp_path):
    write(tmp_path / "one", 3, tracker="3")
    write(tmp_path / "other", 9, tracker="9")
    args = flags(load=str(tmp_path / "one"), elsewhere=str(tmp_path / "other"))
    assert load_all(args) == 3
    assert load_all(args, "elsewhere") == load_all(args, load_arg="elsewhere") == 9


@on_ranks(1)
def test_local_checkpoints_are_asked_for_once_for_all_that_is_read(tmp_path):
    write(tmp_path, 6, tracker="6")
    context = {"local_checkpoint_manager": Namespace(find_latest=lambda: 8)}
    args = flags(load=str(tmp_path), **LOCAL)
    assert load_all(args, checkpointing_context=context) == 8


@on_ranks(1)
def test_megatron_may_give_up_where_nothing_is_there_and_it_was_asked_to(tmp_path):
    args = flags(load=str(tmp_path), exit_on_missing_checkpoint=True)
    with pytest.raises(SystemExit):
        load_all(args, end=SystemExit())
    args.exit_on_missing_checkpoint = False
    with pytest.raises(ValueError, match="could not be loaded"):
        load_all(args, end=SystemExit())
    args.exit_on_missing_checkpoint = True
    write(tmp_path, 3, tracker="3")
    with pytest.raises(ValueError, match="could not be loaded"):
        load_all(args, end=SystemExit())


@on_ranks(1)
def test_an_earlier_load_of_the_program_is_forgotten(tmp_path):
    from megatron_s3.mcore import state
    from megatron_s3.mcore.checkpoint import loading

    write(tmp_path, 3, tracker="3")
    model, optimizer = build()
    state.running().unlike.append(next(model.parameters()))
    with globally(flags(load=str(tmp_path))):
        loading.load_checkpoint(lambda *rest: None, [model], optimizer, None)
        for chunks in (model, [model]):  # Megatron takes both
            unlike = lambda *rest: state.running().unlike.append(torch.nn.Parameter(torch.ones(1)))
            with pytest.raises(ValueError, match="main parameters of a parameter differ"):
                loading.load_checkpoint(unlike, chunks, optimizer, None)
