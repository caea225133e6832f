"""Megatron-core's own loading: when it verifies, and whose param groups it compares with whose."""

import tempfile
from pathlib import Path

import pytest
import torch

from tests.mcore.checkpoints import damage, write
from tests.mcore.library import build, on_ranks


def load(
    folder: Path, asked: dict | None = None, saved: dict | None = None, *given, **kwargs
) -> str:
    from megatron_s3.mcore.checkpoint import library

    library._common = lambda folder: saved
    return library.load(lambda *rest, **kwargs: "loaded", asked or {}, folder, *given, **kwargs)


def of(algorithm: str | None, **values: object) -> dict:
    return {"param_groups": [{"algorithm": algorithm, "p": 3.0, **values}]}


@on_ranks(1)
def test_a_folder_without_megatron_cores_file_is_its_own_to_refuse(tmp_path):
    folder = write(tmp_path, 3) / "iter_0000003"
    (folder / "metadata.json").unlink()
    assert load(folder) == "loaded"


@on_ranks(1)
def test_contents_are_left_unread_if_the_optimizers_configuration_says_so(tmp_path):
    folder = write(tmp_path, 3) / "iter_0000003"
    damage(folder)
    with pytest.raises(ValueError, match=r"__0_0\.distcp is damaged.*Nothing was loaded\. Load an"):
        load(folder)
    build()
    with pytest.raises(ValueError, match=r"__0_0\.distcp is damaged"):
        load(folder)
    built = build(plugin_no_verify_checkpoint=True)
    assert built and load(folder) == "loaded"


S3, NADAM = of("s3"), of("nadam")


@pytest.mark.parametrize(
    ("asked", "saved"),
    [
        ({"optimizer": S3}, {"optimizer": S3, "more": NADAM}),
        ({"optimizer": S3}, {}),  # Megatron says that it is missing
        ({"optimizer": S3}, {"optimizer": {"param_groups": []}}),
        ({"optimizer": {"param_groups": []}}, {"optimizer": S3}),
        ({"optimizer": {"param_groups": ["of another kind"]}}, {"optimizer": S3}),
        ({"optimizer": of(None)}, {"optimizer": of(None, p=2.0)}),
        ({"parts": [S3, NADAM]}, {"parts": [S3, NADAM]}),
        ({"size": torch.Size([2, 3])}, {}),
    ],
)
@on_ranks(1)
def test_groups_of_the_same_optimizer_are_loaded(asked, saved, tmp_path):
    assert load(write(tmp_path, 3) / "iter_0000003", asked, saved) == "loaded"


@pytest.mark.parametrize(
    ("asked", "saved", "fault"),
    [
        ({"optimizer": S3}, {"optimizer": NADAM}, "was saved by NAdam"),
        ({"optimizer": S3}, {"optimizer": of(None)}, "saved by one of Megatron's own optimizers"),
        ({"optimizer": of(None)}, {"optimizer": S3}, r"was saved by S3 \(SoftSignSGD\)"),
        ({"optimizer": S3}, {"optimizer": of("s3", p=2.0)}, r"saved with p=2\.0"),
        ({"optimizer": S3}, {"optimizer": of("s3", format=3)}, "by a newer megatron_s3"),
        ({"a": S3, "b": NADAM}, {"a": NADAM, "b": NADAM}, "was saved by NAdam"),
        ({"parts": [S3, NADAM]}, {"parts": [NADAM, NADAM]}, "was saved by NAdam"),
        ({"a": {"b": [S3]}}, {"a": {"b": [NADAM]}}, "was saved by NAdam"),
    ],
)
@on_ranks(1)
def test_groups_of_another_optimizer_are_refused(asked, saved, fault, tmp_path):
    with pytest.raises(ValueError, match=fault):
        load(write(tmp_path, 3) / "iter_0000003", asked, saved)


@pytest.mark.parametrize("given", [(), (None, True, "assume_ok_unexpected", False)], ids=len)
@on_ranks(2)
def test_the_ranks_that_load_decide_and_no_others(given):
    """Each rank loads a checkpoint of its own; one is of no use. By keyword and by position."""
    groups = [torch.distributed.new_group([rank]) for rank in range(2)]
    rank = torch.distributed.get_rank()
    with tempfile.TemporaryDirectory() as own:
        folder = write(Path(own), 3) / "iter_0000003"
        kwargs = {} if given else {"process_group": groups[rank]}
        place = (*given, groups[rank]) if given else ()
        for saved, fault in ((S3 if rank == 0 else NADAM, "NAdam"), (S3, "is damaged")):
            if fault == "is damaged" and rank == 1:
                damage(folder)
            if rank == 1:
                with pytest.raises(ValueError, match=fault):
                    load(folder, {"optimizer": S3}, {"optimizer": saved}, *place, **kwargs)
            else:
                found = load(folder, {"optimizer": S3}, {"optimizer": saved}, *place, **kwargs)
                assert found == "loaded"
