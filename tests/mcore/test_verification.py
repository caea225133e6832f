"""Verification of what is loaded: once, as far as each rank can, and with a line that says so."""

import contextlib
import io

import pytest
import torch

from tests.mcore.checkpoints import TRACKER, damage, flags, write
from tests.mcore.library import on_ranks


def base(load, args, rank0: bool = False) -> str:
    """Reads it as Megatron's trainer does; returns what is said."""
    from megatron_s3.mcore.checkpoint import loading

    with contextlib.redirect_stdout(io.StringIO()) as said:
        loading.load_base_checkpoint(
            lambda load_dir, args, **kwargs: ({}, "", False, None), load, args, rank0=rank0
        )
    return said.getvalue()


@pytest.mark.parametrize(("form", "times"), [("torch_dist", [1, 0]), ("torch_dcp", [1, 1])])
@on_ranks(1)
def test_it_is_done_once_where_megatron_asks_for_the_arguments_first(form, times, tmp_path):
    """Which it does in the format torch_dist alone."""
    from megatron_s3.mcore.checkpoint import verification

    load, calls = write(tmp_path, 3, tracker="3"), []
    verification.verify_folder = lambda folder, *rest, **kwargs: calls.append(folder)
    counts = []
    for rank0 in (True, False):
        base(load, flags(ckpt_format=form), rank0)
        counts.append(len(calls))
        calls.clear()
    assert counts == times


@on_ranks(1)
def test_it_is_said_how_much_was_read_and_what_skips_it(tmp_path):
    load = write(tmp_path, 3, tracker="3")
    said = base(load, flags(), rank0=True)
    assert said.startswith(f"[megatron_s3] {load}/iter_0000003: checksums verified (0.0 MB by each")
    assert said.endswith("; --plugin-no-verify-checkpoint skips this\n")
    assert base(load, flags(plugin_no_verify_checkpoint=True), rank0=True) == ""
    assert base(None, flags()) == ""


@on_ranks(1)
def test_before_the_ranks_know_each_other_the_arguments_alone_are_read(tmp_path):
    load = write(tmp_path, 3, tracker="3")
    damage(load / "iter_0000003")
    known = torch.distributed.is_initialized
    torch.distributed.is_initialized = lambda: False
    assert base(load, flags(), rank0=True) == ""
    torch.distributed.is_initialized = known
    with pytest.raises(ValueError, match=r"__0_0\.distcp is damaged"):
        base(load, flags(), rank0=True)


@on_ranks(1)
def test_a_file_that_cannot_be_read_is_an_error_on_all_ranks(tmp_path):
    from megatron_s3.storage import checksums

    def fails(*rest):
        raise OSError("Input/output error")

    checksums.verify = fails
    with pytest.raises(ValueError, match=r"Input/output error\. Nothing was loaded, and no other"):
        base(write(tmp_path, 3, tracker="3"), flags(), rank0=True)


@pytest.mark.parametrize("named", ["6", "release"])
@on_ranks(1)
def test_in_the_format_torch_a_rank_looks_for_its_own_file(named, tmp_path):
    """When it reads it, and not when one rank reads the arguments for all."""
    folder = tmp_path / ("release" if named == "release" else "iter_0000006")
    other, own = (folder / f"mp_rank_0{i}" / "model_optim_rng.pt" for i in (1, 0))
    for path in (other, own):
        path.parent.mkdir(parents=True)
        torch.save({"weight": torch.ones(3)}, path)
    (tmp_path / TRACKER).write_text(named)
    args = flags(ckpt_format="torch")
    base(tmp_path, args, rank0=True), base(tmp_path, args)
    own.unlink()
    base(tmp_path, args, rank0=True)
    with pytest.raises(ValueError, match=f"{own} is missing"):
        base(tmp_path, args)
