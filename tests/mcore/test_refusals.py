"""What must not be loaded is refused before anything is, and says what to do instead."""

import re
from pathlib import Path

import pytest
import torch

from tests.harness.trainer import train

pytestmark = pytest.mark.slow

BF16 = ["--bf16", "--use-distributed-optimizer"]


@pytest.fixture(scope="module", params=["dp_reshardable", "fully_reshardable", "torch"])
def checkpoints(request, tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """One of S3 and one of AdamW, in three formats."""
    flags = {
        "dp_reshardable": [*BF16, "--ckpt-format", "torch_dist"],
        "fully_reshardable": [*BF16, "--dist-ckpt-optim-fully-reshardable"],
        "torch": [*BF16, "--ckpt-format", "torch"],
    }[request.param]
    made = []
    for optimizer in ("s3", "adam"):
        made.append(tmp_path_factory.mktemp(optimizer))
        train("--optimizer", optimizer, *flags, "--save", made[-1], "--save-interval", 6)
    return made[0], made[1], flags


def test_another_algorithm_or_p_is_refused(checkpoints: tuple[Path, Path, list[str]]) -> None:
    """Also with the first rank's error the only thing that happens: nothing is trained."""
    s3, adam, flags = checkpoints
    for load, optimizer, message in (
        (s3, ["adam"], "was saved by --optimizer s3, whose state means nothing to --optimizer"),
        (adam, ["s3"], "was saved by --optimizer adam, whose state means nothing to --optimizer"),
        (s3, ["s3", "--s3-p", "2"], "was saved with --s3-p 3.0; its state means nothing with"),
    ):
        run = train("--optimizer", *optimizer, *flags, "--load", load, check=False)
        assert run.returncode != 0
        assert message in run.error
        assert "Nothing was loaded. Resume with" in run.error
        assert run.error.startswith("error: ") and "Traceback" not in run.log
        assert not run.losses


class OfANewerRelease:
    """What Megatron's list of types to unpickle does not have."""


@pytest.mark.parametrize("spoil", ["no states of random numbers", "an unknown type"])
@pytest.mark.parametrize("optimizer", ["s3", "adam"])
def test_what_megatron_gives_up_on_is_no_success(
    optimizer: str, spoil: str, tmp_path: Path
) -> None:
    """Megatron's ``sys.exit()`` is status 0, after which a scheduler goes on."""
    flags = ["--optimizer", optimizer, *BF16, "--ckpt-format", "torch"]
    train(*flags, "--save", tmp_path, "--save-interval", 6)
    path = tmp_path / "iter_0000006" / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    if spoil == "an unknown type":
        state["more"] = OfANewerRelease()
    else:
        state["rng_state"][0]["rng_tracker_states"] = {}
    torch.save(state, path)
    run = train(*flags, "--load", tmp_path, check=False)
    assert run.returncode == 1 and not run.losses, run.log[-5000:]
    assert f"{tmp_path} could not be loaded, for the reason that Megatron prints" in run.error
    assert re.search("could not load the checkpoint|Unable to load rng state", run.log)


def test_to_end_without_a_checkpoint_is_no_error_where_that_is_asked_for(tmp_path: Path) -> None:
    run = train("--optimizer", "s3", "--load", tmp_path, "--exit-on-missing-checkpoint")
    assert "'--exit-on-missing-checkpoint' set ... exiting" in run.log and not run.losses
