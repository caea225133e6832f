"""Algorithm 1 of the paper, line by line, in float64: what every faster path is tested against.

Written to be compared with the page, not to be fast: ``s`` is kept as the paper writes it, which in
float64 holds for ``|g|**p`` between 1e-308 and 1e308.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["S3Reference"]


@dataclass
class S3Reference:
    """S3 on one tensor.

    Attributes:
        x: the parameter, float64, advanced by :meth:`step`.
        beta: coefficient of ``m`` and ``n`` (and of ``s`` and ``b`` where ``beta2`` is None).
        p: order of the denominator's momentum.
        weight_decay: decoupled weight decay (lambda).
        nesterov: False for the ablation "w/o NAG" of Tables III and IV.
        beta2: coefficient of ``s`` and ``b``, or None for the paper's one beta.
        bias_correction: divide both averages by the sum of their weights.
        grad_bound: limit each element of the gradient to so many times ``s**(1/p)`` of the step
            before, where that is not 0; or None.
        beta_ramp: take the smaller of beta and ``(t - 1) / (t + 8)``, and so for beta2.
        cautious: take 0 for an ``n / b`` whose sign is not that of the gradient.
        cautious_steps: the last step that is cautious, or None.
    """

    x: Tensor
    beta: float = 0.95
    p: float = 3.0
    weight_decay: float = 0.0
    nesterov: bool = True
    beta2: float | None = None
    bias_correction: bool = False
    grad_bound: float | None = None
    beta_ramp: bool = False
    cautious: bool = False
    cautious_steps: float | None = None

    def __post_init__(self) -> None:
        self.x = self.x.double().clone()
        self.m = torch.zeros_like(self.x)  # line 1: m_0 = 0
        self.s = torch.zeros_like(self.x)  # line 1: s_0 = 0
        self.t = 0

    def step(self, grad: Tensor, lr: float) -> Tensor:
        """One iteration of the loop of Algorithm 1; returns ``n / b``, float64."""
        g, beta, p = grad.double(), self.beta, self.p
        beta2 = beta if self.beta2 is None else self.beta2
        self.t += 1
        if self.beta_ramp:
            ramp = (self.t - 1) / (self.t + 8)
            beta, beta2 = min(beta, ramp), min(beta2, ramp)
        if self.grad_bound is not None:
            limit = torch.where(self.s > 0, self.grad_bound * self.s ** (1 / p), torch.inf)
            g = g.clamp(-limit, limit)
        self.m = beta * self.m + (1 - beta) * g  # line 4
        self.s = beta2 * self.s + (1 - beta2) * g.abs() ** p  # line 5
        if self.nesterov:
            n = beta * self.m + (1 - beta) * g  # line 6
            b = (beta2 * self.s + (1 - beta2) * g.abs() ** p) ** (1 / p)  # line 7
        else:
            n, b = self.m, self.s ** (1 / p)
        if self.bias_correction:
            k = self.t + 1 if self.nesterov else self.t
            n, b = n / (1 - beta**k), b / (1 - beta2**k) ** (1 / p)
        u = torch.where(b == 0, torch.zeros_like(n), n / b)  # b is 0 only if all g were 0
        if self.cautious and (self.cautious_steps is None or self.t <= self.cautious_steps):
            u = torch.where(u * grad.double().sign() > 0, u, torch.zeros_like(u))
        self.x = self.x - lr * self.weight_decay * self.x - lr * u  # line 8, decoupled decay
        return u
