"""The fused kernel of AdEMAMix, which is optional: the same arithmetic in C++ and in Triton."""

from megatron_s3.rules.kernel_form import KernelForm, with_kernel
from tests.optimizers.example.ademamix import ademamix_update

CPP = """
struct Ademamix {
  static constexpr int STATES = 3;
  using Scalars = AdemamixScalars;

  INLINE void update(Floats& u, Floats (&state)[3], const Floats& g, const Scalars& s) {
    Floats square, denominator;
    average(state[0], s.beta1, s.one_minus_beta1, g);
    average(state[1], s.beta3, s.one_minus_beta3, g);
    EACH square[k] = g[k] * g[k];
    average(state[2], s.beta2, s.one_minus_beta2, square);
    EACH denominator[k] = root(state[2][k] * s.factor2) + s.eps;
    EACH u[k] = state[0][k] * s.factor1 + state[1][k] * s.alpha;
    EACH u[k] = u[k] / denominator[k];
  }
};

extern "C" Chunk rule_ademamix(int64_t) { return chunk<Ademamix>; }
"""


def _numbers(
    *, beta1: float, beta2: float, beta3: float, alpha: float, eps: float,
    correction1: float, correction2: float,
) -> dict[str, float]:  # fmt: skip
    betas = {"beta1": beta1, "beta2": beta2, "beta3": beta3}
    return {
        **betas,
        **{f"one_minus_{name}": 1 - beta for name, beta in betas.items()},
        "alpha": alpha,
        "eps": eps,
        "factor1": 1 / correction1,
        "factor2": 1 / correction2,
    }


with_kernel(
    KernelForm(
        "ademamix",
        states=3,
        scalars=(
            *("beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "beta3", "one_minus_beta3"),
            *("alpha", "eps", "factor1", "factor2"),
        ),
        numbers=_numbers,
        cpp=CPP,
        triton="tests.optimizers.example.ademamix_triton:ademamix",
    )
)(ademamix_update)
