"""What must not be loaded is refused before anything is, and says what to do instead."""

from pathlib import Path

import pytest

from tests.trainer import train

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
        assert not run.losses
