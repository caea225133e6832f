"""Optimizer states and main parameters in the CPU's memory, which the CPU updates."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from megatron_s3.kernels.statistics import Statistics
from megatron_s3.optimizers.counts import Update

__all__ = ["Offload"]


class Offload:
    """The parameters that the CPU updates, and the copies to and from the CPU in each step.

    The gradient is copied to the CPU in its dtype; the new parameter is copied back, rounded to its
    dtype.

    Args:
        params: the optimizer's parameters in order.
        fraction: the fraction of elements to offload: whole parameters are taken, from the first
            on, until the fraction is reached.
        overlap: whether to update each parameter as soon as its gradient has arrived, while others
            are copied; otherwise the step waits for all gradients.
        pin_grads: whether the gradients' copies are in page-locked memory.
        pin_params: the same for the new parameters.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        fraction: float = 1.0,
        *,
        overlap: bool = False,
        pin_grads: bool = True,
        pin_params: bool = True,
    ) -> None:
        params = list(params)
        wanted, taken = fraction * sum(param.numel() for param in params), 0
        #: The parameters that the CPU updates.
        self.params: dict[Tensor, None] = {}
        for param in params:
            if taken >= wanted:
                break
            self.params[param] = None
            taken += param.numel()
        self.overlap = overlap
        self.pin_grads = pin_grads
        self.pin_params = pin_params
        self._forget()

    def _forget(self) -> None:
        self._grads: dict[Tensor, Tensor] = {}
        self._new: dict[Tensor, Tensor] = {}
        self._arrived: dict[Tensor, Any] = {}
        self._streams: tuple[Any, Any] | None = None
        self._statistics: Statistics | None = None

    def __getstate__(self) -> dict[str, Any]:
        settings = ("params", "overlap", "pin_grads", "pin_params")
        return {name: getattr(self, name) for name in settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def batches(self, updates: Iterable[Update]) -> list[list[Update]]:
        """Returns the updates of offloaded parameters, in batches that the CPU takes together."""
        mine = [update for update in updates if update.param in self.params]
        if self.overlap:
            return [[update] for update in mine]
        return [mine] if mine else []

    def master(self, param: Tensor) -> Tensor:
        """Returns a float32 (float64) copy of the parameter for the CPU to update."""
        dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        # A float32 parameter is copied back from this memory.
        empty = self._empty(param, dtype, self.pin_params and param.dtype == dtype)
        return empty.copy_(param.detach())

    def fetch(self, param: Tensor, grad: Tensor) -> Tensor:
        """Starts a gradient's copy to the CPU and returns it; it is valid after :meth:`wait`."""
        copy = self._grads.get(param)
        if copy is None or copy.dtype != grad.dtype:
            copy = self._grads[param] = self._empty(grad, grad.dtype, self.pin_grads)
        if not torch.cuda.is_available():
            copy.copy_(grad)
            return copy
        down, _ = self._both_streams()
        down.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(down):
            copy.copy_(grad, non_blocking=True)
            self._arrived[param] = down.record_event()
        return copy

    def wait(self, params: Iterable[Tensor]) -> None:
        """Waits until the gradients of these parameters have arrived."""
        for param in params:
            if (event := self._arrived.pop(param, None)) is not None:
                event.synchronize()

    def new(self, param: Tensor) -> Tensor | None:
        """Returns the tensor for a parameter's new value; None if it is the main parameter."""
        if param.dtype in (torch.float32, torch.float64):
            return None
        if param not in self._new:
            self._new[param] = self._empty(param, param.dtype, self.pin_params)
        return self._new[param]

    def send_back(self, param: Tensor, master: Tensor) -> None:
        """Copies the new value to the parameter; operations launched afterwards see it."""
        new = self.new(param)
        new = master if new is None else new
        if not torch.cuda.is_available():
            param.copy_(new)
            return
        _, up = self._both_streams()
        up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(up):
            param.copy_(new, non_blocking=True)
        torch.cuda.current_stream().wait_stream(up)

    def statistics(self, device: Statistics | None) -> Statistics | None:
        """Returns the statistics for the CPU's part of a step; the device's absorb them."""
        if device is None:
            return None
        if self._statistics is None or len(self._statistics.values) != len(device.values):
            self._statistics = Statistics("cpu", len(device.values))
        return self._statistics

    def _both_streams(self) -> tuple[Any, Any]:
        """Returns the streams for the copies to the CPU and back."""
        if not self.overlap:
            return (torch.cuda.current_stream(),) * 2
        if self._streams is None:
            made = (torch.cuda.Stream(), torch.cuda.Stream())  # type: ignore[no-untyped-call]
            self._streams = made
        return self._streams

    @staticmethod
    def _empty(like: Tensor, dtype: torch.dtype, pinned: bool) -> Tensor:
        pinned = pinned and torch.cuda.is_available()
        return torch.empty_like(like, dtype=dtype, device="cpu", pin_memory=pinned)
