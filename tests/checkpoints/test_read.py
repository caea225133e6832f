"""Which folder is read, and what of it."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_s3.mcore.checkpoint import read
from megatron_s3.storage import checksums
from megatron_s3.storage.layout import CONFIG, TRACKER


def write(folder: Path, **tensors: object) -> Path:
    """A sealed checkpoint of the format torch_dist, without arguments."""
    dcp.save(tensors or {"weight": torch.ones(3)}, checkpoint_id=folder, no_dist=True)
    (folder / CONFIG).write_text('{"sharded_backend": "torch_dist"}')
    checksums.seal(folder)
    return folder


def test_an_iteration_may_be_named_by_its_folder_and_its_number(tmp_path: Path) -> None:
    found = write(tmp_path / "iter_0000006")
    assert read.find(found) == read.find(found, 6) == found
    with pytest.raises(read.CheckpointError, match="is another iteration than --iteration 5"):
        read.find(found, 5)


def test_a_runs_folder_may_be_called_like_an_iterations(tmp_path: Path) -> None:
    run = tmp_path / "iter_0000006"
    found = write(run / "iter_0000003")
    (run / TRACKER).write_text("3")
    assert read.find(run) == found


def test_a_tracker_file_that_names_nothing_is_said_with_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "iter_0000003")
    (tmp_path / TRACKER).write_text("?")
    with pytest.raises(
        read.CheckpointError, match=r"names '\?' .*there are: iter_0000003\. Choose"
    ):
        read.find(tmp_path)


def test_a_folder_without_tensors_is_no_complete_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000006"
    folder.mkdir()
    (folder / CONFIG).write_text("{}")
    with pytest.raises(read.CheckpointError, match="is not a complete checkpoint of the format"):
        read.find(folder)


def test_the_models_tensors_are_read_and_no_optimizers(tmp_path: Path) -> None:
    """The optimizer's tensors are left out, whether there is one optimizer or a chain of them."""
    model = {"decoder.weight": torch.full((3,), 2.0), "chained.weight": torch.ones(2)}
    states = ("optimizer.state.exp_avg.w", "chained_0.optimizer.state.w", "chained_12.opt.w")
    others = dict.fromkeys(states, torch.ones(1)) | {"rng": {"of": "python"}}
    folder = write(tmp_path / "iter_0000006", **model, **others)
    found = read.tensors(folder)
    assert found.keys() == model.keys()
    assert all(torch.equal(found[name], model[name]) for name in model)


def test_a_checkpoint_without_arguments_is_refused(tmp_path: Path, monkeypatch) -> None:
    from megatron.core import dist_checkpointing

    monkeypatch.setattr(dist_checkpointing, "load_common_state_dict", lambda folder: {})
    with pytest.raises(read.CheckpointError, match="holds no arguments of the run"):
        read.arguments(tmp_path)
