"""What stands on the library alone, where no trainer is."""

import pytest
import torch

from tests.harness.releases import RELEASES
from tests.mcore.library import build, inner, on_ranks, step


@on_ranks(1)
def fails(case):
    raise RuntimeError(f"of case {case}")


@on_ranks(1)
def ends(status):
    raise SystemExit(status)


def test_a_failing_rank_fails_the_test():
    with pytest.raises(AssertionError, match="RuntimeError: of case 3"):
        fails(case=3)
    for status in (None, 0, 3):
        with pytest.raises(AssertionError, match=f"has ended its rank with status {status}"):
            ends(status=status)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("sharded", [True, False])
@on_ranks(1)
def test_a_small_model_is_stepped(release, sharded):
    model, optimizer = build(sharded=sharded)
    before = [param.detach().clone() for param in model.parameters()]
    assert step(model, optimizer)[0]
    assert inner(optimizer).description.name == "s3"
    pairs = zip(before, model.parameters(), strict=True)
    assert not any(torch.equal(old, new) for old, new in pairs)
