"""S3 (SoftSignSGD) as a PyTorch optimizer."""

import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from typing_extensions import Unpack

from megatron_s3.optimizers.arguments import About, Options, Params, Rate, arguments
from megatron_s3.optimizers.base import ElementwiseOptimizer
from megatron_s3.optimizers.description import Description
from megatron_s3.optimizers.from_adam import FromAdam, FromAverage
from megatron_s3.rules.roots import square_root
from megatron_s3.rules.s3 import s3_beta_ramp, s3_bound, s3_correction, s3_update

__all__ = ["S3"]


def _bound(
    *, beta: float, p: float, beta2: float | None, bias_correction: bool, **others: Any
) -> float | None:
    """Returns Theorem 2's bound; with bias correction there is one for a shared beta only."""
    bound = s3_bound(beta, p, beta2)
    return None if math.isinf(bound) or (bias_correction and bound != 1) else bound


#: S3's update has no bias correction, so AdamW's averages are converted without their bias.  The
#: denominators are then those by which each optimizer divides at this moment: the root mean square
#: and the p-norm of recent gradients, which have the same unit and scale.  They are not equal (for
#: normally distributed gradients the 3-norm is 1.17 times the 2-norm), but S3's average over
#: 1/(1-beta) = 20 steps loses the difference within about 60 steps.  ``|m| <= r`` holds for S3's
#: state and need not hold for AdamW's; S3's update is clamped at its bound, so that no element
#: moves by more than lr in either case.  Negative squares, which memory between parameters may
#: hold, become 0; NaN stays NaN.
#:
#: Three times AdamW's learning rate suits a run in progress.  The paper's factor 10 compares
#: complete runs of AdamW and S3; it is the divisor on the way back.
_FROM_ADAM = FromAdam(
    states={
        "exp_avg": FromAverage(
            "exp_avg",
            lambda m, correction: m.div_(correction),
            lambda m, correction: m.mul_(correction),
            ("exp_avg / {}", "exp_avg * {}"),
        ),
        "exp_pnorm": FromAverage(
            "exp_avg_sq",
            lambda v, correction: square_root(v.clamp_min_(0).div_(correction)),
            lambda r, correction: r.square_().mul_(correction),
            ("sqrt(exp_avg_sq / {})", "exp_pnorm^2 * {}"),
        ),
    },
    lr_factor=3.0,
    lr_factor_back=10.0,
)


class S3(ElementwiseOptimizer):
    """SoftSignSGD, Algorithm 1 of "SoftSignSGD (S3)" (Peng et al.), for any torch model.

    ``m <- beta m + (1-beta) g``, ``s <- beta s + (1-beta) |g|**p``,
    ``n = beta m + (1-beta) g``, ``b = (beta s + (1-beta) |g|**p)**(1/p)``,
    ``x <- (1 - lr weight_decay) x - lr n/b``.  With one shared beta ``|n/b| <= 1`` (Theorem 2), so
    that neither bias correction nor gradient clipping is used.

    The state of a parameter is ``exp_avg`` (m) and ``exp_pnorm`` (``s**(1/p)``: the exponentially
    weighted p-norm of its gradients, as Adamax's ``exp_inf`` is the one for p -> inf).

    Args:
        params: parameters or param groups.
        lr: learning rate; about 10 times AdamW's at p=3 in the paper.
        beta: the coefficient of both averages, in [0, 1).
        p: order of the denominator's momentum, any real >= 1.
        weight_decay: decoupled; the paper keeps lr * weight_decay the same as for AdamW.
        nesterov: False gives the ablation "w/o NAG" of Tables III and IV.
        beta2: separate coefficient of ``s`` (their "diff. beta"); the bound is then
            :func:`megatron_s3.rules.s3.s3_update_bound`.
        bias_correction: whether to divide both averages by the sum of their weights (not in the
            paper): the first update is then sign(g) instead of (1-beta**2)**(1-1/p) times that,
            0.21 by default.
        beta_ramp: whether to use ``min(beta, (t - 1) / (t + 8))`` in step t instead of beta, and
            the same for beta2 (not in the paper; see :func:`megatron_s3.rules.s3.s3_beta_ramp`).
        grad_bound: limits every element of a gradient to this multiple of its ``exp_pnorm`` of the
            previous step (not in the paper; see :func:`megatron_s3.rules.s3.s3_update`).  In one
            step ``exp_pnorm`` then grows at most by the factor
            ``(beta + (1 - beta) grad_bound**p)**(1/p)``: 3.7 for 10, 1.1 for 2, and 1 for 1.
        cautious: whether weight decay alone moves an element in a step whose gradient points the
            other way than its update, or is 0 (not in the paper; see
            :func:`megatron_s3.rules.s3.s3_update`).  Fewer elements move, so that the best
            learning rate is larger.
        cautious_steps: the number of first steps in which ``cautious`` holds; None means all.
        error_if_nonfinite, fused, state_dtype: see
            :class:`~megatron_s3.optimizers.base.ElementwiseOptimizer`; a state may be bfloat16 if
            rounding cannot freeze it, and ``exp_avg`` int8 (:meth:`check_state_dtype`):
            ``{"exp_avg": torch.int8, "exp_pnorm": torch.bfloat16}`` is 3 bytes an element.

    Raises:
        ValueError: an argument is out of its range, or a ``state_dtype`` is not allowed.
    """

    description = Description(
        name="s3",
        label="S3 (SoftSignSGD)",
        state=("exp_avg", "exp_pnorm"),
        clip_grad=0.0,
        rule=s3_update,
        bound=_bound,
        momentum="beta",
        from_adam=_FROM_ADAM,
        fractions={"exp_avg": "exp_pnorm"},
    )

    @arguments
    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        *,
        beta: Annotated[float, About("coefficient of both moving averages", 0, 1)] = 0.95,
        p: Annotated[
            float,
            About(
                "order of the moving average in the denominator, any real number of at least 1",
                1,
                fixes_state=True,
            ),
        ] = 3.0,
        beta2: Annotated[
            float | None,
            About(
                "coefficient of the moving average in the denominator, where it differs from beta; "
                "an update may then exceed 1",
                0,
                1,
            ),
        ] = None,
        nesterov: Annotated[
            bool, About("use Nesterov momentum in the numerator and the denominator")
        ] = True,
        bias_correction: Annotated[
            bool,
            About("divide both averages by the sum of their weights, because they start at 0"),
        ] = False,
        beta_ramp: Annotated[
            bool,
            About(
                "use min(beta, (t - 1) / (t + 8)) as the coefficient of step t, so that the "
                "averages are short at first"
            ),
        ] = False,
        grad_bound: Annotated[
            float | None,
            About(
                "limit each element of a gradient to this many times its own exp_pnorm of the step "
                "before",
                1,
            ),
        ] = None,
        cautious: Annotated[
            bool,
            About(
                "move an element by weight decay alone in a step whose gradient is 0 or points "
                "the other way than its update"
            ),
        ] = False,
        cautious_steps: Annotated[
            float | None,
            About("number of first steps in which cautious holds, instead of all steps", 1),
        ] = None,
        **options: Unpack[Options],
    ) -> None: ...

    def check_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Raises ValueError if hyperparameters of a group exclude each other."""
        if values["beta_ramp"] and values["bias_correction"]:
            raise ValueError(
                "beta_ramp and bias_correction exclude each other: with the ramp there is no "
                "bias. Leave one of the two out."
            )
        if values["cautious_steps"] is not None and not values["cautious"]:
            raise ValueError(
                f"cautious_steps={values['cautious_steps']:g} has no effect without cautious. Add "
                "cautious, or leave cautious_steps out."
            )

    @classmethod
    def check_state_dtype(
        cls, name: str, dtype: torch.dtype, hyperparameters: Mapping[str, Any]
    ) -> None:
        """Checks that a state can be kept in a dtype.

        ``exp_avg`` may be int8, as fractions of ``exp_pnorm``, if both have one beta: then
        ``|exp_avg| <= exp_pnorm`` (Theorem 2).  In bfloat16, rounding to nearest must not stop a
        state's decay.  A step lowers ``exp_avg`` by at most the fraction ``1 - beta`` and
        ``exp_pnorm`` by ``1 - beta2**(1/p)``.  A change below half a unit in bfloat16's last
        place, 2**-8 of the value, is lost in rounding.

        Raises:
            ValueError: the dtype is not allowed; the message gives the reason.
        """
        if dtype == torch.float32:
            return
        label = cls.description.label
        if dtype == torch.int8 and name in cls.description.fractions:
            beta, beta2 = hyperparameters["beta"], hyperparameters["beta2"]
            if beta2 is not None and beta2 != beta:
                raise ValueError(
                    f"{label} cannot keep {name} in torch.int8 with beta={beta:g}, "
                    f"beta2={beta2:g}: int8 holds fractions of exp_pnorm, which {name} only stays "
                    "below with one beta for both. Leave beta2 out, or use torch.bfloat16 or "
                    "torch.float32."
                )
            return
        if dtype != torch.bfloat16:
            reason = (
                "its smallest number is 6e-8, and smaller gradients vanish"
                if (dtype == torch.float16)
                else "it is too coarse for an average of gradients"
            )
            raise ValueError(
                f"{label} cannot keep {name} in {dtype}: {reason}. Use torch.bfloat16 or "
                "torch.float32."
            )
        beta, p = hyperparameters["beta"], hyperparameters["p"]
        if name == "exp_pnorm":
            beta2 = hyperparameters["beta2"]
            decay, formula = (beta if beta2 is None else beta2) ** (1 / p), "beta**(1/p)"
        else:
            decay, formula = beta, "beta"
        if 1 - decay < 2.0**-8:
            raise ValueError(
                f"{label} cannot keep {name} in torch.bfloat16 with beta={beta:g}, p={p:g}: a step "
                f"lowers it by at most 1 - {formula} = {1 - decay:.2g} of itself, which rounding "
                "undoes below 2**-8 = 0.0039, so that it would stay at its largest value. Use "
                "torch.float32, or a smaller beta."
            )

    def group_hyperparameters(self, group: dict[str, Any]) -> dict[str, Any]:
        """Returns the rule's arguments in the group's step, on which some of them depend."""
        values = super().group_hyperparameters(group)
        if (steps := values.pop("cautious_steps")) is not None:
            values["cautious"] = values["cautious"] and group["step"] <= steps
        if values.pop("beta_ramp"):
            for name in ("beta", "beta2"):
                if values[name] is not None:
                    values[name] = s3_beta_ramp(group["step"], values[name])
        if values.pop("bias_correction"):
            known = {name: values[name] for name in ("beta", "p", "beta2", "nesterov")}
            values["correction"] = s3_correction(group["step"], **known)
        return values
