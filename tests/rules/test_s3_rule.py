"""S3's rule against Algorithm 1 in float64, and the theorems against both."""

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from megatron_s3.rules.s3 import s3_beta_ramp, s3_correction, s3_update, s3_update_bound
from tests.harness.reference import S3Reference

PS = [1.0, 1.5, 2.0, 3.0, 4.0, 8.0]
MAGNITUDES = [10.0**k for k in range(-36, 37, 6)]
MAX = torch.finfo(torch.float32).max
TINY = 2.0**-126  # the smallest normal number
ROUND = 2.0**-24  # the largest relative error of one rounding among normal numbers
GRID = 2.0**-150  # the largest absolute error of one rounding among denormal numbers


@dataclass(frozen=True)
class Options:
    """Arguments of one run, as the reference names them."""

    beta: float = 0.95
    p: float = 3.0
    nesterov: bool = True
    beta2: float | None = None
    bias_correction: bool = False

    def weight(self, t: int) -> float:
        """The sum of the weights of the first t gradients in n (and in b, if beta2 is None)."""
        return 1 - self.beta ** (t + 1 if self.nesterov else t)


def rule(grads: Tensor, o: Options) -> Tensor:
    """The updates of the rule for a history, shaped (steps, elements), in its dtype."""
    m, r = torch.zeros_like(grads[0]), torch.zeros_like(grads[0])
    shared = {"beta": o.beta, "p": o.p, "beta2": o.beta2, "nesterov": o.nesterov}
    updates = []
    for t, grad in enumerate(grads, start=1):
        factor = s3_correction(t, **shared) if o.bias_correction else 1.0
        updates.append(s3_update(grad, m, r, correction=factor, **shared))
    return torch.stack(updates)


def reference(grads: Tensor, o: Options) -> Tensor:
    """The updates of Algorithm 1 in float64 for the same history."""
    run = S3Reference(torch.zeros_like(grads[0]), **vars(o))
    return torch.stack([run.step(grad, 1.0) for grad in grads])


def into_float64(grads: Tensor) -> tuple[Tensor, Tensor]:
    """A history scaled so that |g|**p stays in float64, and the factor of each element.

    The factor is the power of two that brings the element's largest gradient into [0.5, 1).  All
    finite fp32 numbers are 24-bit multiples of powers from 2**-149 to 2**104, which float64
    multiplies by powers of two without rounding; and u, a quotient of two functions homogeneous of
    degree 1, does not change.  So the reference's answer for the scaled history is its answer.
    """
    exponent = torch.frexp(grads.abs().amax(0)).exponent
    factor = torch.ldexp(torch.ones_like(grads[0], dtype=torch.float64), -exponent)
    return grads.double() * factor, factor


def reference_and_bound(grads: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    """The reference's updates, and for each a bound on the rule's distance in fp32 from it.

    The bound follows the history, in float64, to first order in the rounding errors (then 1% is
    added).  ROUND is e, GRID is h.

    m: each of the coefficient, the product and the sum rounds once, relatively by e or absolutely
       by h, so the error obeys ``err = beta * err + 3 e A + 3 h``, A being the same average of |g|.
       It decays with the average's memory; n is one more such line.
    s: the division by M (p e as a power), the power (2 e), the coefficient, the product and the
       sum (e each) make 5 + p; the root (2 e), the rounding of the exponent 1/p (e |ln w| / p, w
       lying in [smallest weight, 1]) and the product with M (e, or h of r where r is denormal)
       count p-fold: ``err = beta2 * err + s ((4 p + 5 + |ln w|) e + p h / r)``.  b**p is the same.
    u: then n / b, with the divisions and the correction: 8 e of u.

    Where g is 0 and r denormal the rule forgets r: what may have been forgotten is at most s there,
    and decays after.  On that very element and step nothing is promised but |u| <= limit.
    """
    grads, factor = into_float64(grads)
    tiny, grid = TINY * factor, GRID * factor
    beta, p = o.beta, o.p
    beta2 = beta if o.beta2 is None else o.beta2
    lightest = min(beta2, 1 - beta2) * (min(beta2, 1 - beta2) if o.nesterov else 1)
    c = (4 * p + 5 - math.log(lightest)) * ROUND
    zero = torch.zeros_like(grads[0])
    m = average = err_m = s = err_s = forgotten = zero
    updates, bounds = [], []
    for t, grad in enumerate(grads, start=1):
        size = grad.abs()
        r_least = (s - err_s - forgotten).clamp(min=0) ** (1 / p)
        forgets = (size == 0) & (r_least < tiny)
        m = beta * m + (1 - beta) * grad
        average = beta * average + (1 - beta) * size
        err_m = beta * err_m + 3 * ROUND * average + 3 * grid
        s = beta2 * s + (1 - beta2) * size**p
        r = s ** (1 / p)
        err_s = beta2 * err_s + s * (c + p * torch.where(r > 0, grid / r, 0).clamp(max=1))
        forgotten = torch.where(forgets, s, beta2 * forgotten)
        if o.nesterov:
            n, bp = beta * m + (1 - beta) * grad, beta2 * s + (1 - beta2) * size**p
            n_average = beta * average + (1 - beta) * size
            err_n = beta * err_m + 3 * ROUND * n_average + 3 * grid
            err_b, lost = beta2 * err_s + c * bp, beta2 * forgotten
        else:
            n, bp, err_n, err_b, lost = m, s, err_m, err_s, forgotten
        b, b_least = bp ** (1 / p), (bp - err_b - lost).clamp(min=0) ** (1 / p)
        b_most = (bp + err_b) ** (1 / p)
        k = s3_correction(t, beta=beta, p=p, beta2=o.beta2, nesterov=o.nesterov)
        k = k if o.bias_correction else 1.0
        u = torch.where(b > 0, n / b, 0) * k
        bound = k * (err_n / b_least + n.abs() * (1 / b_least - 1 / b_most)) + 8 * ROUND * u.abs()
        anything = 2 * k * s3_update_bound(beta, p, o.beta2)
        untouched = bp == 0  # nothing was rounded, nothing may differ
        bound = torch.where(forgets | (b_least == 0), anything, 1.01 * bound + 1e-12)
        updates.append(u)
        bounds.append(torch.where(untouched, 0, bound))
    return torch.stack(updates), torch.stack(bounds)


def history(kind: str, steps: int = 90, elements: int = 24, seed: int = 0) -> Tensor:
    """Gradients of one kind in fp32, all magnitudes side by side, shaped (steps, -1)."""
    random = torch.Generator().manual_seed(seed)
    shape = (steps, len(MAGNITUDES), elements)
    base = torch.randn(shape, generator=random, dtype=torch.float64)
    if kind == "heavy-tailed":  # Student's t with one degree of freedom
        base = base / torch.randn(shape, generator=random, dtype=torch.float64)
    elif kind == "drops":
        base[steps // 3 :] *= 1e-6
    elif kind == "jumps":
        base[: steps // 3] *= 1e-6
        base[steps // 2] *= 1e6
    elif kind == "sparse":
        base *= torch.rand(shape, generator=random) < 0.05
    elif kind == "constant":
        base[:] = base[0]
    grads = base * torch.tensor(MAGNITUDES, dtype=torch.float64)[:, None]
    if kind == "denormal":
        grads = base * TINY / 8
    return grads.clamp(-MAX, MAX).float().flatten(1)


KINDS = ["gaussian", "heavy-tailed", "drops", "jumps", "sparse", "constant", "denormal"]


# ---- the rule against the reference -------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [True, False], ids=["nag", "no-nag"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", PS)
def test_update_is_the_papers_from_1e_minus_36_to_1e36(p: float, kind: str, nesterov: bool) -> None:
    """Bound: the rounding errors that the averages still remember, see reference_and_bound."""
    o = Options(p=p, nesterov=nesterov)
    grads = history(kind)
    expected, bound = reference_and_bound(grads, o)
    assert ((rule(grads, o).double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("p", PS)
def test_bound_of_the_comparison_is_near_rounding(p: float) -> None:
    """The bound is no licence: below 5e-5 wherever gradients do not reach the denormal numbers."""
    grads = history("gaussian")[:, 24:]  # from 1e-30
    assert reference_and_bound(grads, Options(p=p))[1].max() < 5e-5


@pytest.mark.parametrize("bias_correction", [False, True], ids=["plain", "corrected"])
@pytest.mark.parametrize(
    ("beta", "beta2"), [(0.95, None), (0.9, None), (0.99, None), (0.9, 0.99), (0.95, 0.9)]
)
@pytest.mark.parametrize("p", [1.0, 1.5, 3.0])
def test_coefficients_are_the_papers(
    p: float, beta: float, beta2: float | None, bias_correction: bool
) -> None:
    """Bound: as above, with the correction's one more rounding."""
    if math.isinf(s3_update_bound(beta, p, beta2)):
        pytest.skip("Theorem 2 promises nothing here")
    for nesterov in (True, False):
        o = Options(beta, p, nesterov, beta2, bias_correction)
        grads = history("heavy-tailed", steps=120, elements=8)
        expected, bound = reference_and_bound(grads, o)
        assert ((rule(grads, o).double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("p", PS)
def test_bound_tracks_the_reference(p: float) -> None:
    """float64 rounding: the bound's own copy of Algorithm 1 is S3Reference's."""
    for o in (Options(p=p), Options(p=p, nesterov=False, bias_correction=True)):
        grads = history("heavy-tailed", steps=50, elements=4)
        scaled, _ = into_float64(grads)
        expected, _ = reference_and_bound(grads, o)
        torch.testing.assert_close(reference(scaled, o), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("p", PS)
def test_float64_state_gives_float64_updates(p: float) -> None:
    """Bound: the argument for fp32 with 2**-53 in place of 2**-24."""
    grads = history("heavy-tailed", steps=100, elements=4).double()[:, 16:32]
    torch.testing.assert_close(
        rule(grads, Options(p=p)), reference(grads, Options(p=p)), rtol=0, atol=5e-14
    )


def test_state_is_the_papers() -> None:
    """Bound: 3 roundings a step in m, about 7 in r (see reference_and_bound), 20 steps' memory."""
    grads = history("gaussian")[:, 24 * 6 : 24 * 7]  # magnitude 1
    m, r = torch.zeros_like(grads[0]), torch.zeros_like(grads[0])
    run = S3Reference(torch.zeros_like(grads[0]))
    for grad in grads:
        s3_update(grad, m, r, beta=0.95, p=3.0)
        run.step(grad, 1.0)
    torch.testing.assert_close(r.double(), run.s ** (1 / 3), rtol=7 * 20 * ROUND, atol=0)
    torch.testing.assert_close(m.double(), run.m, rtol=0, atol=3 * 20 * ROUND)


def test_gradient_is_left_as_it_was() -> None:
    """Bitwise: the rule works on its own copies."""
    grad = history("gaussian")[0]
    before = grad.clone()
    s3_update(grad, torch.ones_like(grad), torch.ones_like(grad), beta=0.95, p=3.0)
    assert torch.equal(grad, before)


# ---- |u| <= 1 -----------------------------------------------------------------------------------

fp32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
extreme = st.sampled_from([0.0, 1e-45, -1e-45, TINY, -TINY, 1e-30, 1.0, -1.0, 1e30, MAX, -MAX])
orders = st.one_of(st.sampled_from([*PS, 16.0, 64.0]), st.floats(1, 64))
coefficients = st.one_of(st.sampled_from([0.0, 0.5, 0.9, 0.95, 0.999]), st.floats(0.001, 0.999))


@given(
    st.lists(st.one_of(fp32, extreme), min_size=1, max_size=12),
    orders,
    coefficients,
    st.booleans(),
    st.integers(1, 12),
)
def test_update_never_exceeds_one(
    grads: list[float], p: float, beta: float, nesterov: bool, repeats: int
) -> None:
    """Exact, no tolerance: the clamp carries Theorem 2 (2) over the rounding."""
    series = torch.tensor(grads, dtype=torch.float32).repeat_interleave(repeats).repeat(2)
    u = rule(series[:, None], Options(beta, p, nesterov))
    assert (u.abs() <= 1).all()  # False for NaN


@pytest.mark.parametrize("nesterov", [True, False], ids=["nag", "no-nag"])
@pytest.mark.parametrize("p", [*PS, 1.0001, 2.5, 16.0, 64.0])
def test_random_bit_patterns_stay_within_one(p: float, nesterov: bool) -> None:
    """Exact; gradients are all finite fp32 patterns alike, so that every second one is an extreme.

    The state stays finite too, and r never exceeds the largest |g| seen: w is at most 1.
    """
    random = torch.Generator().manual_seed(0)
    m, r, largest = torch.zeros(3, 4096).unbind()
    for _ in range(40):
        bits = torch.randint(-(2**31), 2**31, (4096,), generator=random).int()
        grad = bits.view(torch.float32).nan_to_num(0, 0, 0)
        u = s3_update(grad, m, r, beta=0.95, p=p, nesterov=nesterov)
        largest = torch.maximum(largest, grad.abs())
        assert (u.abs() <= 1).all()
        assert m.isfinite().all()
        assert (r <= largest).all()
        assert (r >= 0).all()


@pytest.mark.parametrize("p", PS)
@pytest.mark.parametrize("value", [MAX, 1.0, TINY, 2.0**-149])
def test_constant_gradient_stays_within_one_and_finite(p: float, value: float) -> None:
    """Exact; the case of equality in Theorem 2 (2), where rounding would pass 1 first."""
    grads = torch.full((600, 1), value)
    u = rule(grads, Options(p=p))
    assert (u.abs() <= 1).all()
    assert u[-1] >= (1 - 600 * ROUND if value >= TINY else 0)


@pytest.mark.parametrize("p", [1.0, 3.0, 8.0])
def test_holds_where_the_processor_flushes_denormals(p: float) -> None:
    """Exact: r and every ratio are normal numbers or irrelevant, so flushing changes nothing."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        grads = history("heavy-tailed", steps=60, elements=2)
        grads[:, :2] = 1.5 * TINY  # whose b and n are denormal at first, and flushed
        grads = torch.cat([grads, history("denormal", steps=60, elements=2)])
        u = rule(grads, Options(p=p))
    finally:
        torch.set_flush_denormal(False)
    assert (u.abs() <= 1).all()
    expected, bound = reference_and_bound(grads[:60, 2:], Options(p=p))  # from 1e-30
    assert ((u[:60, 2:].double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("nesterov", [True, False], ids=["nag", "no-nag"])
@pytest.mark.parametrize("p", PS)
def test_update_is_bounded_by_the_weights_so_far(p: float, nesterov: bool) -> None:
    """|u_t| <= (1 - beta**(t+1))**(1 - 1/p), and beta**t without Nesterov momentum.

    n and b**p carry the same weights, which sum to W = 1 - beta**(t+1); by Hölder's inequality
    |n| <= W**(1 - 1/p) b.  Float64 rounding for the reference, the bound of the comparison for the
    rule.  Constant gradients reach it.
    """
    o = Options(p=p, nesterov=nesterov)
    for kind in ("constant", "heavy-tailed"):
        grads = history(kind, steps=80, elements=4)
        expected, bound = reference_and_bound(grads, o)
        limits = [o.weight(t) ** (1 - 1 / p) for t in range(1, 81)]
        limit = torch.tensor(limits, dtype=torch.float64)[:, None]
        assert (expected.abs() <= limit * (1 + 1e-12)).all()
        assert (rule(grads, o).abs() <= limit + bound).all()
        if kind == "constant":
            assert (expected.abs() >= limit * (1 - 1e-12)).all()


# ---- the first step, silence, and what is not finite --------------------------------------------


@pytest.mark.parametrize("p", [*PS, 64.0])
@pytest.mark.parametrize("beta", [0.5, 0.9, 0.95, 0.99])
def test_first_step_is_a_known_fraction_of_the_sign(beta: float, p: float) -> None:
    """A few roundings (5e-7): (1 - beta**2)**(1 - 1/p), 1 - beta without NAG, corrected 1."""
    grads = torch.tensor([[1e-30, -3.0, 1e30, -1e-10]])
    fractions = {
        Options(beta, p): (1 - beta**2) ** (1 - 1 / p),
        Options(beta, p, nesterov=False): (1 - beta) ** (1 - 1 / p),
        Options(beta, p, bias_correction=True): 1.0,
        Options(beta, p, nesterov=False, bias_correction=True): 1.0,
    }
    for o, fraction in fractions.items():
        torch.testing.assert_close(rule(grads, o), grads.sign() * fraction, rtol=5e-7, atol=0)


@pytest.mark.parametrize("p", PS)
def test_zero_gradients_give_exactly_zero(p: float) -> None:
    """Bitwise: +0 in u and in both states."""
    m, r = torch.zeros(2, 5).unbind()
    for _ in range(3):
        u = s3_update(torch.tensor([0.0, -0.0, 0, 0, 0]), m, r, beta=0.95, p=p)
        assert torch.equal(u, torch.zeros(5))
    assert torch.equal(m, torch.zeros(5))
    assert torch.equal(r, torch.zeros(5))


@pytest.mark.parametrize("p", PS)
def test_denormal_gradients_are_not_lost(p: float) -> None:
    """Within the grid: 2**-140 has 512 steps of it, of which the first n takes 50, give or take 2.

    From 2**-126 on to 3e-6: four roundings of m and n, each 2**-24 / 0.0975 of n.
    """
    u = rule(torch.tensor([[2.0**-140, TINY]]), Options(p=p))[0].tolist()
    fraction = (1 - 0.95**2) ** (1 - 1 / p)
    assert u[0] == pytest.approx(fraction, rel=0.04)
    assert u[1] == pytest.approx(fraction, rel=3e-6)


@pytest.mark.parametrize("nesterov", [True, False], ids=["nag", "no-nag"])
@pytest.mark.parametrize("p", [1.5, 2.0, 3.0])
def test_silence_ends_in_no_update(p: float, nesterov: bool) -> None:
    """Bound beta**(k (1 - 1/p)) after k zero gradients (plus rounding), for ever; then exactly 0.

    Rounded, beta * m equals m below about 10 times 2**-149, and r stops likewise: kept in that
    state, an embedding row that is not used any more would drift at a third of lr.
    """
    beta, steps = 0.8, 1500  # r = 1 passes 2**-126 after 126 p ln 2 / -ln 0.8 = 392 p steps
    u = rule(torch.eye(steps, 1), Options(beta, p, nesterov))[:, 0].double().abs()
    k = torch.arange(steps, dtype=torch.float64)
    assert (u <= beta ** (k * (1 - 1 / p)) + 1e-6).all()
    assert (u[1300:] == 0).all()


def test_order_one_keeps_moving_until_its_average_is_denormal() -> None:
    """Exact in the paper too: at p=1 both averages decay alike, so u stays 1 in silence."""
    u = rule(torch.eye(600, 1), Options(0.8, 1.0))[:, 0]
    torch.testing.assert_close(u[:300], torch.ones(300), rtol=0, atol=2e-5)
    assert (u[500:] == 0).all()


def test_beta_zero_is_the_sign() -> None:
    """One rounding per operation: no memory, whatever the gradients before."""
    grads = torch.tensor([[1e30], [-1e-30], [0.0], [1e-20], [-MAX], [TINY]])
    for p in PS:
        torch.testing.assert_close(rule(grads, Options(0.0, p)), grads.sign(), rtol=5e-7, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_gradient_spoils_its_own_element_only(bad: float) -> None:
    """Bitwise: the neighbours are as without it; the element's own u is NaN for good."""
    for p in PS:
        grads = history("gaussian", steps=6, elements=1)
        spoiled = grads.clone()
        spoiled[2, 5] = bad
        u, clean = rule(spoiled, Options(p=p)), rule(grads, Options(p=p))
        assert u[2:, 5].isnan().all()
        others = torch.arange(u.shape[1]) != 5
        assert torch.equal(u[:, others], clean[:, others])


# ---- Theorem 2 (1): different coefficients ------------------------------------------------------

PAIRS = [(0.9, 0.99), (0.9, 0.95), (0.95, 0.999), (0.5, 0.9), (0.9, 0.85)]


def worst_case(beta1: float, beta2: float, p: float, steps: int) -> Tensor:
    """Hölder's case of equality: |g| changes by (beta2 / beta1)**(1 / (p-1)) a step.

    Equality needs ``beta2**j |g|**p`` proportional to ``(beta1**j / beta2**(j/p))**q`` in the age
    j, so ``|g|`` proportional to ``(beta1 / beta2)**(j q / p)``; q / p = 1 / (p-1).
    """
    age = torch.arange(steps - 1, -1, -1, dtype=torch.float64)
    return ((beta1 / beta2) ** (age / (p - 1)))[:, None]


@pytest.mark.parametrize("nesterov", [True, False], ids=["nag", "no-nag"])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, 8.0])
@pytest.mark.parametrize(("beta1", "beta2"), PAIRS)
def test_different_coefficients_keep_the_bound(
    beta1: float, beta2: float, p: float, nesterov: bool
) -> None:
    """Theorem 2 (1).  Reference: up to float64's rounding.  Rule: the bound rounded to fp32."""
    limit = s3_update_bound(beta1, p, beta2)
    if math.isinf(limit):
        pytest.skip("beta1 >= beta2**(1/p)")
    o = Options(beta1, p, nesterov, beta2)
    series = [history(kind, steps=100, elements=2) for kind in KINDS]
    if p > 1:
        series.append(worst_case(beta1, beta2, p, 100).float())
    for grads in series:
        assert (reference(into_float64(grads)[0], o).abs() <= limit * (1 + 1e-12)).all()
        assert (rule(grads, o).abs() <= limit * (1 + ROUND)).all()


@pytest.mark.parametrize("p", [1.5, 2.0, 3.0, 8.0])
@pytest.mark.parametrize(("beta1", "beta2"), PAIRS)
def test_worst_case_reaches_the_bound_without_nesterov(
    beta1: float, beta2: float, p: float
) -> None:
    """Without NAG the bound is the supremum: within 1e-4 on the reference and on the rule.

    With NAG it is not reached: the proof treats g_t as two terms, of weights 1 and beta, and
    equality would need them of different size.  With those two weights added up, Hölder's
    inequality gives the supremum under NAG, which is smaller.
    """
    limit = s3_update_bound(beta1, p, beta2)
    if math.isinf(limit):
        pytest.skip("beta1 >= beta2**(1/p)")
    ratio = beta1 / beta2 ** (1 / p)
    steps = math.ceil(math.log(1e-5) / math.log(ratio) * p) + 10
    grads = worst_case(beta1, beta2, p, steps)
    plain, nag = Options(beta1, p, False, beta2), Options(beta1, p, True, beta2)
    assert reference(grads, plain)[-1] == pytest.approx(limit, rel=1e-4)
    assert rule(grads.float(), plain)[-1] == pytest.approx(limit, rel=1e-4)
    q = p / (p - 1)
    a = [(1 - beta1) * beta1 ** (j + 1) for j in range(steps)]
    b = [(1 - beta2) * beta2 ** (j + 1) for j in range(steps)]
    a[0] += 1 - beta1
    b[0] += 1 - beta2
    supremum = sum((x / y ** (1 / p)) ** q for x, y in zip(a, b, strict=True)) ** (1 / q)
    tail = 1 + 1e-5  # of the weights older than the history
    assert reference(grads, nag)[-1] <= supremum * tail
    nearer = torch.tensor([(x / y) ** (q / p) for x, y in zip(a, b, strict=True)]).double()
    assert reference(nearer.flip(0)[:, None], nag)[-1] == pytest.approx(supremum, rel=1e-4)
    if abs(beta1 - beta2) > 0.06:
        assert supremum * tail < limit


@pytest.mark.parametrize("p", PS)
def test_equal_coefficients_have_the_smallest_bound(p: float) -> None:
    """Theorem 2 (2), exact at 1; any other beta2 in the theorem's range has a larger one."""
    beta = 0.9
    assert s3_update_bound(beta, p) == 1
    assert s3_update_bound(beta, p, beta) == 1
    for beta2 in (0.89, 0.91, 0.95, 0.99):
        assert s3_update_bound(beta, p, beta2) > 1


def test_bound_is_infinite_outside_the_theorem() -> None:
    """Exact: the condition is beta < beta2**(1/p); the rule then leaves u unclamped."""
    assert s3_update_bound(0.9, 2, 0.81 - 1e-9) == math.inf
    assert s3_update_bound(0.9, 2, 0.81 + 1e-9) < math.inf
    assert s3_update_bound(0.9, 1, 0.89) == math.inf
    # The power (0.9 / 0.5) ** (p / (p - 1)) is larger than a float can be.
    assert s3_update_bound(0.9, 1.0001, 0.5) == math.inf
    assert s3_update_bound(0.9, 3, 0) == math.inf
    grads = torch.tensor([[1.0]] + [[0.0]] * 60)
    o = Options(0.95, 2.0, beta2=0.5)
    torch.testing.assert_close(rule(grads, o).double(), reference(grads, o), rtol=1e-4, atol=0)


@given(st.floats(1, 64), st.floats(0.01, 0.99), st.floats(0.01, 0.999))
def test_bound_is_at_least_one_and_never_fails(p: float, beta: float, beta2: float) -> None:
    """Up to float64's rounding; Theorem 2 (2) says 1 is the smallest.  p near 1 has q near inf."""
    assert s3_update_bound(beta, p, beta2) >= 1 - 1e-7


def test_bound_is_continuous_at_order_one() -> None:
    """Bound: (4) tends to (1 - beta) / (1 - beta2) as p -> 1, where q -> inf."""
    assert s3_update_bound(0.9, 1 + 1e-9, 0.99) == pytest.approx(s3_update_bound(0.9, 1, 0.99))


# ---- a ramp of beta (not in the paper) ----------------------------------------------------------


def ramped_weights(beta: float, steps: int, nesterov: bool) -> Tensor:
    """What n (or m) gives each of ``steps`` gradients under a ramp that ends at beta; float64."""
    weights = torch.zeros(steps, dtype=torch.float64)
    for t in range(1, steps + 1):
        c = s3_beta_ramp(t, beta)
        weights *= c
        weights[t - 1] = 1 - c
    if nesterov:
        weights *= c
        weights[-1] += 1 - c
    return weights


@given(
    st.floats(1.1, 16),
    st.floats(0, 0.99),
    st.one_of(st.none(), st.floats(0.01, 0.99)),
    st.integers(1, 60),
    st.booleans(),
)
@example(3.0, 0.8, 0.99, 60, False)
@example(1.1, 0.99, None, 60, True)
@example(2.0, 0.9, 0.85, 60, False)  # the denominator's is held first
def test_worst_case_under_a_ramp_is_within_the_bound_of_the_step(
    p: float, beta: float, beta2: float | None, steps: int, nesterov: bool
) -> None:
    """Hölder's case of equality for weights a in n and c in b**p, ``|g|`` like (a/c)**(1/(p-1)).

    No gradients have a larger update (that of all is ``sum((a / c**(1/p))**q)**(1/q)``), and it is
    within the bound of the step's own coefficients, in float64; the rule, clamped there, agrees.
    """
    a = ramped_weights(beta, steps, nesterov)
    c = a if beta2 is None else ramped_weights(beta2, steps, nesterov)
    last = s3_beta_ramp(steps, beta)
    last2 = None if beta2 is None else s3_beta_ramp(steps, beta2)
    limit = s3_update_bound(last, p, last2)
    size = torch.where(a > 0, a / c, 0) ** (1 / (p - 1))
    assume(bool(size.max() < 1e10 * size[a > 0].min()))  # or |g|**p leaves float64
    run = S3Reference(torch.zeros(1), beta, p, nesterov=nesterov, beta2=beta2, beta_ramp=True)
    m, r = torch.zeros(2, 1, dtype=torch.float64).unbind()
    for t, g in enumerate(size, start=1):
        expected = run.step(g.view(1), 1.0)
        found = s3_update(
            g.view(1),
            m,
            r,
            beta=s3_beta_ramp(t, beta),
            p=p,
            beta2=None if beta2 is None else s3_beta_ramp(t, beta2),
            nesterov=nesterov,
        )
    q = p / (p - 1)
    supremum = (torch.where(a > 0, a / c ** (1 / p), 0) ** q).sum() ** (1 / q)
    assert expected.item() == pytest.approx(supremum.item(), rel=1e-9)
    assert found.item() == pytest.approx(supremum.item(), rel=1e-9)
    assert expected.item() <= limit * (1 + 1e-9)


@given(
    st.lists(st.one_of(st.floats(-1e3, 1e3), st.sampled_from([1e9, -1e9])), min_size=1),
    st.floats(1, 16),
    st.floats(0, 0.99),
    st.booleans(),
)
def test_no_update_exceeds_one_under_a_ramp(
    grads: list[float], p: float, beta: float, nesterov: bool
) -> None:
    """Up to float64's rounding: the reference clamps nothing.  The first update is the sign."""
    run = S3Reference(torch.zeros(1), beta, p, nesterov=nesterov, beta_ramp=True)
    values = [0.0 if abs(g) < 1e-15 else g for g in grads]
    updates = [run.step(torch.tensor([g]).double(), 1.0).item() for g in values]
    assert max(map(abs, updates)) <= 1 + 1e-12
    first = torch.tensor(values[:1], dtype=torch.float64).sign().item()
    assert updates[0] == pytest.approx(first, rel=1e-12)


# ---- a bound on each gradient (not in the paper) ------------------------------------------------


@given(
    st.lists(st.one_of(st.floats(width=32), extreme), min_size=2, max_size=12),
    orders,
    coefficients,
    st.floats(1, 1e6),
    st.booleans(),
)
def test_bounded_gradients_are_the_rule_on_limited_ones(
    grads: list[float], p: float, beta: float, grad_bound: float, nesterov: bool
) -> None:
    """Bitwise; |u| <= 1 exactly, for infinite gradients too once r is there, NaN for NaN."""
    options = {"beta": beta, "p": p, "nesterov": nesterov}
    m, r, m2, r2 = torch.zeros(4, 1).unbind()
    for value in grads:
        g = torch.tensor([value])
        known = r.item() >= TINY
        limit = (r * grad_bound).item() if known else math.inf
        limited = g.clamp(-limit, limit)
        before = g.clone()
        u = s3_update(g, m, r, grad_bound=grad_bound, **options)
        expected = s3_update(limited, m2, r2, **options)
        assert torch.equal(g.nan_to_num(), before.nan_to_num())
        for one, other in ((u, expected), (m, m2), (r, r2)):
            assert torch.equal(one.nan_to_num(nan=77.0), other.nan_to_num(nan=77.0))
        if value != value or (math.isinf(value) and math.isinf(limit)):
            assert u.isnan()
            break
        assert u.abs() <= 1


@pytest.mark.parametrize("nesterov", [True, False], ids=["nag", "no-nag"])
@pytest.mark.parametrize("p", PS)
def test_bounded_updates_are_the_references(p: float, nesterov: bool) -> None:
    """Float64's rounding, over the steps: heavy tails, of which the bound cuts off some."""
    grads = history("heavy-tailed", steps=60, elements=8)[:, 40:64].double()  # around 1
    run = S3Reference(torch.zeros_like(grads[0]), p=p, nesterov=nesterov, grad_bound=1.7)
    free = S3Reference(torch.zeros_like(grads[0]), p=p, nesterov=nesterov)
    m, r = torch.zeros(2, grads.shape[1], dtype=torch.float64).unbind()
    differ = 0
    for grad in grads:
        u = s3_update(grad, m, r, beta=0.95, p=p, nesterov=nesterov, grad_bound=1.7)
        expected = run.step(grad, 1.0)
        differ += ((free.step(grad, 1.0) - expected).abs() > 1e-3).sum().item()
        torch.testing.assert_close(u, expected, rtol=1e-10, atol=1e-12)
    assert differ > 100


@pytest.mark.parametrize("p", PS)
def test_denominator_grows_by_a_known_factor_at_most(p: float) -> None:
    """(beta + (1-beta) grad_bound**p)**(1/p) up to a few roundings, which inf reaches."""
    beta, grad_bound = 0.95, 10.0
    m, r = torch.zeros(2, 3).unbind()
    s3_update(torch.tensor([1e-20, 1.0, 1e20]), m, r, beta=beta, p=p)
    before = r.clone()
    u = s3_update(torch.full((3,), math.inf), m, r, beta=beta, p=p, grad_bound=grad_bound)
    factor = (beta + (1 - beta) * grad_bound**p) ** (1 / p)
    torch.testing.assert_close(r / before, torch.full((3,), factor), rtol=1e-6, atol=0)
    assert ((u > 0) & (u <= 1)).all()


def test_infinite_gradient_without_a_past_is_not_bounded() -> None:
    """There is nothing to limit it to: its element turns NaN, as without a bound."""
    m, r = torch.zeros(2, 2).unbind()
    u = s3_update(torch.tensor([math.inf, 1.0]), m, r, beta=0.95, p=3.0, grad_bound=10.0)
    assert u.isnan().tolist() == [True, False]


@pytest.mark.parametrize("p", [2.0, 3.0])
@pytest.mark.parametrize("grad_bound", [2.0, 10.0])
def test_bounded_gradient_after_silence(p: float, grad_bound: float) -> None:
    """An embedding's rare row: 1e-3, of what m still holds, from the fraction the docstring names.

    Where r was forgotten altogether nothing is limited, and u is what it is without a bound.
    """
    beta = 0.5
    for silence, fraction in (
        (60, (1 + beta**2 / ((1 - beta**2) * grad_bound**p)) ** (-1 / p)),
        (500, 1.0),
    ):
        m, r, m2, r2 = torch.zeros(4, 1).unbind()
        for g in (1.0, *[0.0] * silence, 1.0):
            one = torch.tensor([g])
            u = s3_update(one, m, r, beta=beta, p=p, grad_bound=grad_bound)
            free = s3_update(one, m2, r2, beta=beta, p=p)
        assert (u / free).item() == pytest.approx(fraction, rel=1e-3)
        assert (r < r2).item() == (silence == 60)


# ---- cautious updates ---------------------------------------------------------------------------


@given(st.lists(fp32, min_size=1, max_size=20), orders, coefficients, st.booleans())
def test_a_cautious_update_is_the_rules_own_or_nothing(
    grads: list[float], p: float, beta: float, nesterov: bool
) -> None:
    """Bitwise; nothing where the gradient is 0 or points the other way.  The state is the same."""
    options = {"beta": beta, "p": p, "nesterov": nesterov}
    m, r, m2, r2 = torch.zeros(4, 1).unbind()
    for value in grads:
        g = torch.tensor([value])
        u = s3_update(g, m, r, cautious=True, **options)
        expected = s3_update(g, m2, r2, **options)
        for one, other in ((m, m2), (r, r2)):
            assert torch.equal(one.nan_to_num(nan=77.0), other.nan_to_num(nan=77.0))
        opposed = math.copysign(1, value) != math.copysign(1, expected.item()) or value == 0
        if expected.isnan():
            assert u.isnan()
        else:
            assert u.item() == (0 if opposed else expected.item())


@pytest.mark.parametrize("nesterov", [True, False], ids=["nag", "no-nag"])
@pytest.mark.parametrize("p", PS)
def test_cautious_updates_are_the_references(p: float, nesterov: bool) -> None:
    """Float64's rounding, over the steps."""
    grads = history("heavy-tailed", steps=60, elements=8)[:, 40:64].double()
    run = S3Reference(torch.zeros_like(grads[0]), p=p, nesterov=nesterov, cautious=True)
    m, r = torch.zeros(2, grads.shape[1], dtype=torch.float64).unbind()
    still = 0
    for grad in grads:
        u = s3_update(grad, m, r, beta=0.95, p=p, nesterov=nesterov, cautious=True)
        still += int((u == 0).sum())
        torch.testing.assert_close(u, run.step(grad, 1.0), rtol=1e-10, atol=1e-12)
    assert still > 100


# ---- Theorem 2 (3): larger p, smaller update ----------------------------------------------------


@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=30),
    st.floats(1, 16),
    st.floats(1, 16),
    st.booleans(),
)
def test_larger_order_has_the_larger_denominator(
    grads: list[float], p1: float, p2: float, nesterov: bool
) -> None:
    """Theorem 2 (3): b(p1) <= b(p2) for p1 <= p2, up to float64's rounding.

    The weights of b**p sum to W = 1 - beta**(t+1) < 1, so that b(p) = W**(1/p) M(p), M(p) being the
    power mean with weights of sum 1.  M grows with p, and so does W**(1/p) because W <= 1: the
    theorem holds as printed, from the first step on, and |u| falls with p for the same gradients.
    Below 1e-15 of the largest, |g|**16 leaves float64: those count as 0 here.
    """
    p1, p2 = sorted((p1, p2))
    series = torch.tensor(grads, dtype=torch.float64)[:, None]
    series = torch.where(series.abs() < 1e-15, 0, series)
    low, high = (S3Reference(torch.zeros(1), p=p, nesterov=nesterov) for p in (p1, p2))
    for grad in series:
        u1, u2 = low.step(grad, 1.0), high.step(grad, 1.0)
        assert low.s ** (1 / p1) <= high.s ** (1 / p2) * (1 + 1e-12)
        assert u2.abs() <= u1.abs() * (1 + 1e-12)


def test_larger_order_has_the_smaller_update_in_fp32() -> None:
    """Theorem 2 (3) on the rule, up to the comparison's bound on either side."""
    grads = history("heavy-tailed", steps=60, elements=4)
    runs = [
        (rule(grads, Options(p=p)), reference_and_bound(grads, Options(p=p))[1])
        for p in (1, 1.5, 3, 8)
    ]
    for (u1, bound1), (u2, bound2) in pairwise(runs):
        assert (u2.abs() <= u1.abs() + bound1 + bound2).all()


# ---- Theorem 3: three forms of NAG --------------------------------------------------------------


@given(st.integers(0, 10**6), st.floats(0, 0.99), st.floats(0.01, 0.3), st.integers(1, 6))
def test_three_forms_of_nag_give_the_same_iterates(
    seed: int, beta: float, gamma: float, size: int
) -> None:
    """Theorem 3 up to float64's rounding, on random quadratics with random noise.

    (I) steps the shifted x~ with x_t = x~_t - gamma beta m_{t-1}, so both start at one point
    (m_0 = 0); (III) needs g_0 = 0 and r_0 = 0.
    """
    random = torch.Generator().manual_seed(seed)
    a = torch.randn(size, size, generator=random, dtype=torch.float64)
    hessian = a @ a.T / size
    start = torch.randn(size, generator=random, dtype=torch.float64)
    shifted, second, third = start.clone(), start.clone(), start.clone()
    m1 = m2 = m3 = r = previous = torch.zeros_like(start)
    for _ in range(30):
        noise = torch.randn(size, generator=random, dtype=torch.float64)
        first = shifted - gamma * beta * m1
        scale = 1e-11 * (1 + first.abs().max())
        assert (first - second).abs().max() <= scale
        assert (second - third).abs().max() <= scale

        m1 = beta * m1 + (1 - beta) * (hessian @ first + noise)
        shifted = shifted - gamma * m1

        grad = hessian @ second + noise
        m2 = beta * m2 + (1 - beta) * grad
        second = second - gamma * (beta * m2 + (1 - beta) * grad)

        grad = hessian @ third + noise
        m3 = beta * m3 + (1 - beta) * grad
        r = beta * r + (1 - beta) * (grad - previous)
        third, previous = third - gamma * (m3 + beta * r), grad


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=20), st.floats(0, 0.99))
def test_numerator_is_the_third_forms_too(grads: list[float], beta: float) -> None:
    """n = m + beta r (equation 22), up to float64's rounding; n is read back as u b at p = 1."""
    run = S3Reference(torch.zeros(1), beta=beta, p=1.0)
    m = r = previous = s = 0.0
    for g in grads:
        g = 0.0 if abs(g) < 1e-100 else g
        u = run.step(torch.tensor([g], dtype=torch.float64), 1.0).item()
        m = beta * m + (1 - beta) * g
        r, previous = beta * r + (1 - beta) * (g - previous), g
        s = beta * s + (1 - beta) * abs(g)
        b = beta * s + (1 - beta) * abs(g)
        assert u * b == pytest.approx(m + beta * r, abs=1e-12)


# ---- Figure 1 -----------------------------------------------------------------------------------


def test_toy_of_figure_1_reaches_its_minimum() -> None:
    """Only that: f goes from 180.5 to below 1e-6 without noise, lr falling to 0."""
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    m, r = torch.zeros(2, 2, dtype=torch.float64).unbind()
    steps = 1000
    for t in range(steps):
        loss = 0.5 * (x[0] - 1 / x[1]) ** 2 + 0.5 * (x[0] - 20 * x[1]) ** 2
        (grad,) = torch.autograd.grad(loss, x)
        with torch.no_grad():
            x -= 0.02 * (1 - t / steps) * s3_update(grad, m, r, beta=0.95, p=3.0)
    assert loss < 1e-6
