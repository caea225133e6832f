"""Which of a parameter's updates a step is: counted by parameter, as torch's optimizers do."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from megatron_s3 import S3
from megatron_s3.optimizers import OPTIMIZERS, AdamW, NAdam
from megatron_s3.optimizers.counts import Counts, GroupUpdates, Update, Watched, is_empty, split
from megatron_s3.optimizers.host import Host

#: Optimizers whose rule reads the step.
READING: dict[str, Callable[..., Any]] = {
    name: OPTIMIZERS[name] for name in ("adamw", "nadam", "adan")
}
READING["s3, bias correction"] = lambda p, **k: S3(p, bias_correction=True, **k)
READING["s3, ramp"] = lambda p, **k: S3(p, beta_ramp=True, **k)


def two() -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(64, generator=generator)) for _ in range(2)]


def grad(seed: int) -> torch.Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(seed))


def run(optimizer: Any, params: list[Parameter], steps: range, *, late: int) -> None:
    """The second parameter has a gradient in every third step from ``late`` on."""
    for t in steps:
        params[0].grad = grad(2 * t)
        params[1].grad = grad(2 * t + 1) if t >= late and t % 3 == 0 else None
        optimizer.step()


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("name", READING)
def test_a_parameter_counts_its_own_updates(name: str, fused: bool | None) -> None:
    """Bitwise as in an optimizer of its own, which steps when it has a gradient."""
    one, alone = two(), two()
    together = READING[name](one, lr=0.01, fused=fused)
    run(together, one, range(60), late=30)
    apart = [READING[name]([param], lr=0.01, fused=fused) for param in alone]
    for t in range(60):
        alone[0].grad = grad(2 * t)
        apart[0].step()
        if t >= 30 and t % 3 == 0:
            alone[1].grad = grad(2 * t + 1)
            apart[1].step()
    assert all(map(torch.equal, one, alone))
    assert together.param_groups[0]["step"] == 60


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (AdamW, torch.optim.AdamW),
        (NAdam, lambda p, **k: torch.optim.NAdam(p, decoupled_weight_decay=True, **k)),
    ],
)
def test_as_torch_counts(ours: Any, theirs: Any) -> None:
    one, other = two(), two()
    run(ours(one, lr=0.01, beta1=0.9, beta2=0.999), one, range(200), late=100)
    run(theirs(other, lr=0.01, betas=(0.9, 0.999), weight_decay=0.0), other, range(200), late=100)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", READING)
def test_a_step_without_any_gradient_counts_nothing(name: str) -> None:
    one, other = two(), two()
    a, b = READING[name](one, lr=0.01), READING[name](other, lr=0.01)
    for t in range(5):
        for param in one:
            param.grad = None
        a.step()
        for params, optimizer in ((one, a), (other, b)):
            for i, param in enumerate(params):
                param.grad = grad(2 * t + i)
            optimizer.step()
    assert all(map(torch.equal, one, other))
    assert a.param_groups[0]["step"] == 5


@pytest.mark.parametrize("name", READING)
@pytest.mark.parametrize("how", ["file", "deepcopy"])
def test_counts_go_on_where_they_were(name: str, how: str) -> None:
    """Bitwise, also where a parameter has no gradient between."""
    params = two()
    optimizer = READING[name](params, lr=0.01)
    run(optimizer, params, range(20), late=10)
    if how == "file":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        again = [Parameter(param.detach().clone()) for param in params]
        resumed = READING[name](again, lr=0.5)
        resumed.load_state_dict(torch.load(file, weights_only=True))
    else:
        resumed = copy.deepcopy(optimizer)
        again = resumed.param_groups[0]["params"]
    for its, one in ((params, optimizer), (again, resumed)):
        run(one, its, range(20, 30), late=10)
    assert all(map(torch.equal, params, again))


def test_what_is_saved_is_of_the_old_format_where_all_counts_are_equal() -> None:
    params = two()
    optimizer = AdamW(params)
    for t in range(3):
        for i, param in enumerate(params):
            param.grad = grad(2 * t + i)
        optimizer.step()
    (group,) = optimizer.state_dict()["param_groups"]
    assert "steps" not in group and (group["step"], group["format"]) == (3, 1)
    params[1].grad = None
    optimizer.step()
    (group,) = optimizer.state_dict()["param_groups"]
    assert (group["step"], group["steps"], group["format"]) == (4, [4, 3], 2)


def test_an_old_file_has_one_count_for_all() -> None:
    """Also where the optimizer that loads it had others."""
    old, new = two(), two()
    saved = AdamW(old)
    for t in range(7):
        for i, param in enumerate(old):
            param.grad = grad(2 * t + i)
        saved.step()
    optimizer = AdamW(new)
    run(optimizer, new, range(9), late=5)
    optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert "steps" not in optimizer.state_dict()["param_groups"][0]
    assert optimizer.param_groups[0]["step"] == 7


def test_counts_that_were_lost_on_the_way_are_missed() -> None:
    params = two()
    optimizer = AdamW(params)
    run(optimizer, params, range(5), late=9)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["steps"]
    with pytest.raises(ValueError, match=r"number of updates of every parameter, which is missing"):
        AdamW(two()).load_state_dict(saved)


def test_s3_as_it_is_by_default_counts_nothing_by_parameter() -> None:
    params = two()
    optimizer = S3(params)
    run(optimizer, params, range(5), late=9)
    assert not optimizer.counts
    assert "steps" not in optimizer.state_dict()["param_groups"][0]


def test_what_is_loaded_replaces_what_was_counted() -> None:
    both, one = ([torch.nn.Parameter(torch.ones(3)) for _ in range(2)] for _ in range(2))
    whole, uneven = AdamW(both), AdamW(one)
    for i, param in enumerate([*both, *one]):
        param.grad = torch.ones(3) if i < 3 else None
    whole.step(), uneven.step()
    assert uneven.state_dict()["param_groups"][0]["steps"] == [1, 0]
    uneven.host.log_path = False
    third = AdamW([torch.nn.Parameter(torch.ones(3)) for _ in range(2)])
    third.load_state_dict(uneven.state_dict())
    assert third.param_groups[0]["format"] == 1  # what a group holds has no steps beside it
    uneven.load_state_dict(whole.state_dict())
    assert uneven.host.log_path is False
    assert "steps" not in uneven.state_dict()["param_groups"][0]


def test_a_copy_that_an_older_version_wrote_is_read():
    """Whose settings were attributes of the optimizer itself."""
    state = S3([torch.zeros(3, requires_grad=True)]).__getstate__()
    del state["host"]
    read = S3.__new__(S3)
    read.__setstate__(state | {"master_params": True, "offload": None})
    assert read.host == Host(master_params=True)
    assert not hasattr(read, "master_params")


def updates(group: dict[str, Any], *params: Parameter) -> GroupUpdates:
    """Of a rule that reads the step; what a kernel is given of them is left out."""
    operands: Any = None
    return GroupUpdates(group, {}, True, [Update(p, p, operands, []) for p in params])


def test_an_update_is_numbered_where_its_number_is_not_the_groups_step() -> None:
    """A number splits the updates of a step, so that parameters that count alike have none."""
    counts, (a, b) = Counts(), two()
    group = {"params": [a, b], "step": 3}
    counts.begin(group, [b])
    part = updates(group, a, a, b)
    counts.number([part])
    assert [update.count for update in part.updates] == [None, 5, 1]
    counts.advance([part])
    assert group["step"] == 4 and [counts.of(param, group) for param in (a, b)] == [5, 1]


def test_a_parameter_that_has_caught_up_counts_with_its_group_again() -> None:
    counts, (a, b) = Counts(), two()
    group = {"params": [a, b], "step": 3, "steps": [1, 3]}
    counts.load([group])
    assert "steps" not in group and counts.of(a, group) == 1
    for expected in (3, 5):
        part = updates(group, a, a, b)
        counts.number([part])
        counts.advance([part])
        assert counts.of(a, group) == expected
    assert not counts and group["step"] == 5


def test_counts_that_are_kept_are_those_before_the_groups_step_is_set() -> None:
    counts, (a, b) = Counts(), two()
    group = {"params": [a, b], "step": 3}
    counts.begin(group, [b])
    counts.keep(group)
    group["step"] = 9
    assert [counts.of(param, group) for param in (a, b)] == [3, 0]


@pytest.mark.parametrize("cuts", [[], [1], [2], [1, 2], [1, 2, 3]])
def test_a_step_that_is_cut_holds_each_update_once_and_in_order(cuts: list[int]) -> None:
    params = [*two(), *two()]
    parts = [updates({"step": 0}, *params[:3]), updates({"step": 0}, *params[3:])]
    pieces = split(parts, cuts)
    found = [[u.param for part in piece for u in part.updates] for piece in pieces]
    ends = [*cuts, 4]
    expected = [params[start:end] for start, end in zip([0, *cuts], ends, strict=True)]
    assert [list(map(id, piece)) for piece in found] == [list(map(id, p)) for p in expected]


def test_a_group_notices_that_its_step_is_read() -> None:
    for read in (lambda group: group["step"], lambda group: group.get("step")):
        group = Watched({"step": 3, "lr": 0.1})
        assert (group["lr"], group.get("lr"), group.read) == (0.1, 0.1, False)
        assert read(group) == 3 and group.read


def test_a_parameter_that_is_not_made_yet_is_not_an_empty_one() -> None:
    """Torch does not tell its size."""
    assert not is_empty(torch.nn.UninitializedParameter())
    assert is_empty(Parameter(torch.zeros(0))) and not is_empty(Parameter(torch.zeros(1)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("step", value) for value in (None, "3", -1, 1.5, math.inf, True)],
        *[("steps", value) for value in (None, [], [5], [5, 1, 1], [5, -1], [5, 1.5], "51")],
    ],
)
def test_counts_that_cannot_be_are_refused(name: str, value: Any) -> None:
    params = two()
    optimizer = AdamW(params)
    run(optimizer, params, range(5), late=3)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["steps"] == [5, 1]
    new = AdamW(two())
    before = new.state_dict()
    with pytest.raises(ValueError, match=rf"in param group 0 {name}=.*\. Nothing was loaded"):
        new.load_state_dict({**saved, "param_groups": [saved["param_groups"][0] | {name: value}]})
    assert new.state_dict() == before


def test_a_count_may_be_any_whole_number_and_must_be_there() -> None:
    """Frameworks save it as a 0-dim tensor, or as a float."""
    params = two()
    optimizer = AdamW(params)
    run(optimizer, params, range(5), late=0)
    saved = optimizer.state_dict()
    for step in (torch.tensor(5), torch.tensor(5.0), 5.0):
        saved["param_groups"][0]["step"] = step
        new = AdamW(two())
        new.load_state_dict(saved)
        assert type(new.param_groups[0]["step"]) is int and new.param_groups[0]["step"] == 5
    del saved["param_groups"][0]["step"]
    with pytest.raises(ValueError, match="step=None, which must be a whole number"):
        AdamW(two()).load_state_dict(saved)


def test_a_state_without_groups_is_refused_as_torch_does() -> None:
    with pytest.raises(ValueError, match="different number of parameter groups"):
        AdamW(two()).load_state_dict({"state": {}, "param_groups": []})
