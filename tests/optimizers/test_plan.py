"""A step that repeats the last one's plan does what a step without a plan does.

Each case takes steps with two optimizers that are alike: one remembers its plans, the other forgets
them before every step.  Between the steps something is changed in both.  Parameters, states,
statistics, paths and errors must be the same, bit for bit, and the case says whether the plan may
be repeated.
"""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_s3.kernels.statistics import Statistics
from megatron_s3.optimizers import S3, AdamW, NAdam
from megatron_s3.optimizers.offload import Offload
from megatron_s3.optimizers.plan import Plans

SHAPES = ((3, 5), (7,), (16, 4), (), (0,), (1, 40))
Action = Callable[["Twin"], Any]


class Twin:
    """An optimizer, its parameters, and what it is told to do."""

    def __init__(self, kind: type = S3, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        make = torch.Generator().manual_seed(1)
        self.params = [nn.Parameter(torch.randn(s, generator=make).to(dtype)) for s in SHAPES]
        groups = [
            {"params": self.params[:3]},
            {"params": self.params[3:], "weight_decay": 0.1, "lr": 0.02},
        ]
        self.optimizer = kind(groups, lr=0.01, **options)
        self.make = torch.Generator().manual_seed(2)
        self.kept: list[Any] = []

    def give_grads(self) -> None:
        """Fills the gradients in place, where there are any, and makes those that are missing."""
        for param in self.params:
            grad = torch.randn(param.shape, generator=self.make)
            if param.grad is None:
                param.grad = grad.to(param.dtype)
            else:
                with torch.no_grad():
                    param.grad.copy_(grad.view_as(param.grad))

    def step(self) -> tuple[str, Any]:
        """Takes a step, and returns its error, if any, and all that it may have changed."""
        error = ""
        try:
            self.optimizer.step()
        except (RuntimeError, ValueError) as raised:
            error = f"{type(raised).__name__}: {raised}"
        statistics = self.optimizer.host.statistics
        tensors = [t for p in self.params for t in (p, *self.optimizer.state[p].values())]
        bits = [copied_bits(tensor) for tensor in tensors]
        steps = [group["step"] for group in self.optimizer.param_groups]
        totals = None if statistics is None else statistics.values.clone()
        return error, (bits, steps, self.optimizer.path, totals)


def copied_bits(tensor: Tensor) -> Tensor | None:
    """Returns a copy of a tensor that has values."""
    has_values = not tensor.is_meta and (tensor.untyped_storage().nbytes() or not tensor.numel())
    return tensor.detach().clone().contiguous() if has_values else None


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and bool(torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)))
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def new_grads(twin: Twin) -> None:
    twin.kept += [param.grad for param in twin.params]  # so that their memory is not used again
    for param in twin.params:
        param.grad = None


def set_grads(change: Callable[[Tensor], Tensor | None]) -> Action:
    def action(twin: Twin) -> None:
        twin.give_grads()
        for param in twin.params[:2]:
            param.grad = change(param.grad)

    return action


def decoupled(twin: Twin) -> None:
    for param in twin.params:
        param.decoupled_grad = param.grad.to(torch.bfloat16)
        param.grad = None


def set_in_groups(**values: Any) -> Action:
    return lambda twin: [group.update(values) for group in twin.optimizer.param_groups]


def reload(twin: Twin) -> None:
    twin.optimizer.load_state_dict(copy.deepcopy(twin.optimizer.state_dict()))


def move_data(twin: Twin) -> None:
    for param in twin.params:
        twin.kept.append(param.data)
        param.data = param.data.clone()


def replace_state(change: Callable[[Tensor], Tensor]) -> Action:
    def action(twin: Twin) -> None:
        state = twin.optimizer.state[twin.params[2]]
        twin.kept.append(state["exp_avg"])
        state["exp_avg"] = change(state["exp_avg"])

    return action


def change_state_in_place(twin: Twin) -> None:
    twin.optimizer.state[twin.params[2]]["exp_avg"].t_()


def add_group(twin: Twin) -> None:
    twin.params.append(nn.Parameter(torch.ones(4)))
    twin.optimizer.add_param_group({"params": twin.params[-1:]})


def add_param(twin: Twin) -> None:
    twin.params.append(nn.Parameter(torch.ones(4)))
    twin.optimizer.param_groups[0]["params"].append(twin.params[-1])


def swap_params(twin: Twin) -> None:
    twin.optimizer.param_groups[0]["params"].reverse()


def move_to_the_other_group(twin: Twin) -> None:
    one, two = twin.optimizer.param_groups
    two["params"].insert(0, one["params"].pop())


def swap_states(twin: Twin) -> None:
    state = twin.optimizer.state[twin.params[2]]
    twin.optimizer.state[twin.params[2]] = dict(zip(reversed(state), state.values(), strict=True))


def reshape_grad(twin: Twin) -> None:
    twin.params[2].grad.data = twin.params[2].grad.data.view(4, 16)


def give_statistics(twin: Twin) -> None:
    twin.optimizer.host.statistics = Statistics("cpu", 2)
    twin.optimizer.host.statistics.rows = {twin.params[0]: 1}


def give_models(twin: Twin) -> None:
    twin.models = {p: torch.zeros(p.numel(), dtype=torch.bfloat16) for p in twin.params}
    twin.optimizer.host.model_params = twin.models


def overlap_grad(twin: Twin) -> None:
    """A gradient in the memory of a parameter that is updated before."""
    twin.params[1].grad = twin.params[2].data.view(-1)[:7]


def free(which: str) -> Action:
    def action(twin: Twin) -> None:
        param = twin.params[2]
        tensor = {"param": param, "grad": param.grad}.get(which)
        tensor = twin.optimizer.state[param]["exp_avg"] if tensor is None else tensor
        tensor.untyped_storage().resize_(0)

    return action


def poison(twin: Twin) -> None:
    twin.optimizer.error_if_nonfinite = True
    with torch.no_grad():
        twin.params[2].grad[0] = torch.nan


def to_half_and_back(twin: Twin) -> None:
    for dtype in (torch.float64, torch.float32):
        for param in twin.params:
            twin.kept.append(param.data)
            param.data = param.data.to(dtype)


def change_algorithm(twin: Twin) -> None:
    """From NAdam to AdamW, whose states have the same names."""
    group = twin.optimizer.param_groups[1]
    values = {h.name: h.default for h in AdamW.description.hyperparameters}
    group.update(values, algorithm="adamw")


def keep_counts(twin: Twin) -> None:
    """Does what the adapter does for a checkpoint whose parameters have counts of their own."""
    for group in twin.optimizer.param_groups:
        group["beta_ramp"] = True
        twin.optimizer.counts.keep(group)
        group["step"] = 100


def change_one_group(twin: Twin) -> None:
    twin.optimizer.param_groups[1]["beta"] = 0.5


def own_class(twin: Twin) -> None:
    class Own(Tensor):
        pass

    twin.params[1].grad = twin.params[1].grad.as_subclass(Own)


#: What happens before a step, and whether this step may repeat the last one's plan.
CASES: dict[str, tuple[Action, bool]] = {
    "nothing": (lambda twin: None, True),
    "new gradients": (new_grads, True),
    "a gradient is missing": (set_grads(lambda grad: None), False),
    "bf16 gradients": (decoupled, False),
    "gradients of another layout": (set_grads(lambda g: torch.stack([g, g], -1)[..., 0]), False),
    "negated gradients": (set_grads(torch._neg_view), False),
    "sparse gradients": (set_grads(Tensor.to_sparse), False),
    "gradients of a class of their own": (own_class, False),
    "a gradient in a parameter": (overlap_grad, False),
    "a rate": (set_in_groups(lr=0.3), True),
    "a rate that is a tensor": (set_in_groups(lr=torch.tensor(0.3)), True),
    "no rate": (set_in_groups(lr=None), True),
    "a rate that is not a rate": (set_in_groups(lr=-1.0), True),
    "a decay": (set_in_groups(weight_decay=0.7), True),
    "beta": (set_in_groups(beta=0.5), True),
    "p": (set_in_groups(p=2), True),
    "a p without a kernel": (set_in_groups(p=2.5), False),
    "beta of one group": (change_one_group, False),
    "a flag": (set_in_groups(nesterov=False), True),
    "a rule that reads the step": (set_in_groups(beta_ramp=True), True),
    "a bound": (set_in_groups(grad_bound=3.0), True),
    "a momentum from a scheduler": (set_in_groups(momentum=0.8), True),
    "load_state_dict": (reload, False),
    "parameters that moved": (move_data, False),
    "a state by hand": (replace_state(Tensor.clone), False),
    "a state in bf16": (replace_state(lambda s: s.to(torch.bfloat16)), False),
    "a state of another shape": (replace_state(lambda s: s.view(-1)), False),
    "a state on meta": (replace_state(lambda s: s.to("meta")), False),
    "a state that was transposed": (change_state_in_place, False),
    "no state": (lambda twin: twin.optimizer.state.clear(), False),
    "a group more": (add_group, False),
    "a parameter more": (add_param, False),
    "another order": (swap_params, False),
    "another group": (move_to_the_other_group, False),
    "states with each other's names": (swap_states, False),
    "a gradient of another shape": (reshape_grad, False),
    "statistics": (give_statistics, False),
    "counts of their own": (keep_counts, False),
    "states in the memory of the CPU": (
        lambda twin: setattr(twin.optimizer.host, "offload", Offload(twin.params[:2])),
        False,
    ),
    "copies in the model": (give_models, False),
    "torch operations": (lambda twin: setattr(twin.optimizer, "fused", False), False),
    "a parameter without memory": (free("param"), False),
    "a gradient without memory": (free("grad"), False),
    "a state without memory": (free("state"), False),
    "NaN where it is an error": (poison, True),
    "float64 and back": (to_half_and_back, False),
}


class Watch:
    """The answers of :meth:`Plans.repeat`: True, False, or None if it raised an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.repeated: list[bool | None] = []
        repeat = Plans.repeat

        def watched(plans: Plans, optimizer: Any) -> bool:
            self.repeated.append(None)
            self.repeated[-1] = repeat(plans, optimizer)
            return bool(self.repeated[-1])

        monkeypatch.setattr(Plans, "repeat", watched)


def forgetful(twin: Twin) -> Twin:
    twin.optimizer._past.plans = Plans()
    return twin


@pytest.mark.parametrize("name", CASES)
def test_a_repeated_step_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    action, repeatable = CASES[name]
    watch = Watch(monkeypatch)
    one, two = Twin(), Twin()
    for step in range(5):
        for twin in (one, two):
            twin.give_grads()
            if step == 2:
                action(twin)
                if name in ("new gradients", "a group more", "a parameter more"):
                    twin.give_grads()
        expected = forgetful(two).step()
        watch.repeated.clear()
        found = one.step()
        assert same(found, expected), step
        assert step != 1 or watch.repeated == [True]
        if step == 2:
            raised = bool(expected[0])
            assert watch.repeated == [(None if raised else True) if repeatable else False]
        for twin in (one, two):
            if hasattr(twin.params[0], "decoupled_grad"):
                for param in twin.params:
                    param.decoupled_grad = None
            if expected[0]:  # what was wrong stays wrong, and is said again
                return


def test_another_algorithm_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    one, two = Twin(NAdam), Twin(NAdam)
    for step in range(5):
        for twin in (one, two):
            twin.give_grads()
            if step == 2:
                change_algorithm(twin)
        expected = forgetful(two).step()
        watch.repeated.clear()
        assert same(one.step(), expected)
        assert watch.repeated == [step not in (0, 2)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [S3, NAdam])
@pytest.mark.parametrize("master", [False, True])
def test_half_precision(
    kind: type, dtype: torch.dtype, master: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    one, two = Twin(kind, dtype), Twin(kind, dtype)
    for step in range(4):
        for twin in (one, two):
            twin.optimizer.host.master_params = master
            twin.give_grads()
        expected = forgetful(two).step()
        watch.repeated.clear()
        assert same(one.step(), expected)
        assert watch.repeated == [step > 0]


def test_steps_with_and_without_statistics_have_plans_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = Watch(monkeypatch)
    one, two = Twin(), Twin()
    kept = [Statistics("cpu"), Statistics("cpu")]
    for step in range(6):
        for twin, statistics in zip((one, two), kept, strict=True):
            twin.optimizer.host.statistics = statistics if step % 2 else None
            twin.give_grads()
        expected = forgetful(two).step()
        watch.repeated.clear()
        assert same(one.step(), expected)
        assert watch.repeated == [step > 1]


def test_a_parameter_that_pauses_where_the_rule_reads_the_step() -> None:
    """Its own count of updates differs from its group's, which a plan does not know."""
    one, two = Twin(beta_ramp=True), Twin(beta_ramp=True)
    for step in range(8):
        for twin in (one, two):
            twin.give_grads()
            if step in (0, 3, 4):
                twin.params[1].grad = None
        assert same(one.step(), forgetful(two).step())
    assert one.optimizer.state_dict()["param_groups"][0]["steps"]


def test_a_group_that_pauses_counts_its_steps() -> None:
    one, two = Twin(), Twin()
    for step in range(6):
        for twin in (one, two):
            twin.give_grads()
            if step in (2, 3, 4):
                for param in twin.params[3:]:
                    param.grad = None
        assert same(one.step(), forgetful(two).step())


@pytest.mark.parametrize(("groups", "betas", "calls"), [(2, 1, 1), (3, 2, 2), (20, 1, 3)])
def test_groups_with_other_rates_share_a_call(groups: int, betas: int, calls: int) -> None:
    """A call takes as many groups as the GPU's kernel compares with, if their rule is the same."""
    one, two = Twin(), Twin()
    for twin in (one, two):
        twin.params = [nn.Parameter(torch.ones(5)) for _ in range(groups)]
        settings = [
            {
                "params": [param],
                "lr": 0.01 * i,
                "weight_decay": 0.1 * (i % 3),
                "beta": 0.9 + 0.05 * (i % betas),
            }
            for i, param in enumerate(twin.params, 1)
        ]
        twin.optimizer = S3(settings)
    for _ in range(4):
        for twin in (one, two):
            new_grads(twin)
            twin.give_grads()
        assert same(one.step(), forgetful(two).step())
    (plan,) = one.optimizer._past.plans._plans.values()
    assert len(plan.calls) == calls


def test_no_tensor_is_kept_from_being_freed() -> None:
    """Frameworks move states to the CPU and drop gradients to free the device's memory."""
    twin = Twin()
    for _ in range(2):
        twin.give_grads()
        twin.optimizer.step()
    tensors = [weakref.ref(param.grad) for param in twin.params]
    tensors += [weakref.ref(t) for s in twin.optimizer.state.values() for t in s.values()]
    twin.optimizer.zero_grad(set_to_none=True)
    twin.optimizer.state.clear()
    gc.collect()
    assert [ref() for ref in tensors] == [None] * len(tensors)


def test_a_plan_has_no_memory_on_a_device() -> None:
    """A rank allocates what is planned, and a plan adds nothing to it."""
    twin = Twin()
    for _ in range(2):
        new_grads(twin)
        twin.give_grads()
        twin.optimizer.step()
    (plan,) = twin.optimizer._past.plans._plans.values()
    held = [*vars(plan).values()]
    for spot in (plan._written, plan._grads):
        held += [getattr(spot, name) for name in spot.__slots__]
    for call in plan.calls:
        held += [*vars(call.prepared).values(), *map(vars, call.prepared._groups), call.indices]
    held += [each for one in held if isinstance(one, list | tuple) for each in one]
    held += [each for one in held if isinstance(one, dict) for each in one.values()]
    assert len(held) > 100 and not any(isinstance(one, Tensor) for one in held)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_remembers_nothing_of_the_original(copied: Callable[[Any], Any]) -> None:
    twin, other = Twin(), Twin()
    for each in (twin, other):
        each.give_grads()
        each.step()
    second = copied(twin.optimizer)
    params = [param for group in second.param_groups for param in group["params"]]
    before = [param.detach().clone() for param in twin.params]
    for param, grad in zip(params, [p.grad for p in twin.params], strict=True):
        param.grad = grad.clone()
    second.step()
    assert same([p.detach() for p in twin.params], before)
    other.step()
    assert same([p.detach() for p in params], [p.detach() for p in other.params])


@pytest.mark.parametrize(
    "what", ["parameters", "gradient", "transposed", "statistics", "rows", "no master"]
)
def test_what_a_plan_depends_on(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is changed after two steps with a plan, or is never repeated from the first step on."""
    watch = Watch(monkeypatch)
    dtype = torch.bfloat16 if what == "no master" else torch.float32
    one, two = Twin(dtype=dtype), Twin(dtype=dtype)
    for twin in (one, two):
        twin.optimizer.host.master_params = True
        if what == "parameters":  # two that share memory are updated in order
            twin.params[0].data = twin.params[2].data.view(-1)[:15].view(3, 5)
        elif what == "gradient":  # one that lies in a parameter that is updated before
            twin.params[1].grad = twin.params[0].data.view(-1)[:7]
        elif what == "transposed":
            twin.params[2].data = twin.params[2].data.t().contiguous().t()
        elif what in ("statistics", "rows"):
            give_statistics(twin)
    for step in range(5):
        for twin in (one, two):
            twin.give_grads()
            if step == 3 and what == "statistics":
                give_statistics(twin)
                twin.optimizer.host.statistics.rows = {twin.params[1]: 1}
            elif step == 3 and what == "rows":
                twin.optimizer.host.statistics.rows[twin.params[1]] = 1
            elif step == 3:
                twin.optimizer.host.master_params = False
        expected = forgetful(two).step()
        watch.repeated.clear()
        assert same(one.step(), expected)
        always = what in ("statistics", "rows", "no master")
        assert watch.repeated == [always and step not in (0, 3)]


def test_a_rule_that_comes_to_read_the_step_beside_a_parameter_that_pauses() -> None:
    one, two = Twin(), Twin()
    for step in range(6):
        for twin in (one, two):
            twin.give_grads()
            if 0 < step < 4:
                twin.params[1].grad = None
            if step == 2:
                set_in_groups(beta_ramp=True)(twin)
        assert same(one.step(), forgetful(two).step()), step


def test_the_path_is_that_of_the_last_step() -> None:
    one, two = Twin(), Twin()
    for twin in (one, two):
        give_statistics(twin)
        twin.kept = [twin.optimizer.host.statistics]
    for step in range(6):
        odd = step == 4  # without statistics, and with a gradient that has no kernel
        for twin in (one, two):
            twin.give_grads()
            twin.optimizer.host.statistics = None if odd else twin.kept[0]
            twin.params[1].decoupled_grad = twin.params[1].grad.double() if odd else None
        expected = forgetful(two).step()
        assert same(one.step(), expected)
        assert ("portable" in one.optimizer.path) == odd


def test_empty_shards_alone_count_steps_until_they_are_filled() -> None:
    param = nn.Parameter(torch.zeros(0))
    optimizer = S3([param])
    for _ in range(3):
        optimizer.step()
    assert optimizer.param_groups[0]["step"] == 3
    param.data = torch.ones(2)
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 3  # there is no gradient


def test_gradients_that_take_turns_in_two_places(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    one, two = Twin(), Twin()
    for twin in (one, two):
        twin.kept = [[torch.zeros_like(p) for p in twin.params] for _ in range(2)]
    for step in range(5):
        for twin in (one, two):
            for param, grad in zip(twin.params, twin.kept[step % 2], strict=True):
                param.grad = grad
            twin.give_grads()
        expected = forgetful(two).step()
        watch.repeated.clear()
        assert same(one.step(), expected)
        assert watch.repeated == [step > 0]


def test_a_copy_in_the_model_that_another_parameter_gets() -> None:
    one, two = Twin(), Twin()
    for twin in (one, two):
        twin.params = [nn.Parameter(torch.ones(4)) for _ in range(3)]
        twin.optimizer = S3(twin.params, lr=0.5)
        twin.kept = [torch.zeros(4, dtype=torch.bfloat16)]
    for step in range(4):
        for twin in (one, two):
            twin.give_grads()
            twin.optimizer.host.model_params = {twin.params[step // 2]: twin.kept[0]}
        assert same(one.step(), forgetful(two).step())
        assert same(one.kept, two.kept)


def test_an_optimizer_is_freed_with_its_last_reference() -> None:
    twin = Twin()
    for _ in range(2):
        twin.give_grads()
        twin.optimizer.step()
    param = weakref.ref(twin.params[0])
    gc.collect()
    gc.disable()
    try:
        del twin
        assert param() is None
    finally:
        gc.enable()


def test_autograd_notices_a_repeated_step() -> None:
    """A tensor that backward needs must not be changed by a step without an error."""
    twin = Twin()
    for _ in range(2):
        twin.give_grads()
        twin.optimizer.step()
    loss = (twin.params[1] * twin.params[1]).sum()
    twin.optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_all_that_is_written_has_a_new_version() -> None:
    half, single = Twin(dtype=torch.bfloat16), Twin()
    half.optimizer.host.master_params = True
    give_models(single)
    for _ in range(3):
        written = [*half.params, *single.params, *getattr(single, "models", {}).values()]
        written += [s["master_param"] for s in half.optimizer.state.values()]
        before = [tensor._version for tensor in written]
        for twin in (half, single):
            twin.give_grads()
            twin.optimizer.step()
        assert all(t._version > v for t, v in zip(written, before, strict=True))
