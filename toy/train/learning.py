"""The toy trainings' loop: optimizers and their schedule, a moving average, lines of progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from toy.device import DEVICE
from toy.train.muon import Muon


def learn(
    name: str,
    modules: nn.Module,
    batches: Iterable[Tensor],
    steps: int,
    loss: Callable[..., Tensor],
    rate: float,
    average: float = 0.0,
    decay: float = 0.02,
    hidden: Sequence[nn.Parameter] = (),
    after: Callable[[int], None] | None = None,
    prepare: Callable[[int, Tensor], tuple[Tensor, ...]] | None = None,
) -> nn.Module:
    """Train with a warm-up and a cosine schedule, in bfloat16 arithmetic on float32 weights.

    Args:
        name: begins the lines of progress.
        modules: what is trained.
        batches: one batch of indices per step.
        steps: their number.
        loss: takes a batch, or the tensors of ``prepare``.
        rate: the highest learning rate.
        average: decay of the moving average of the weights; 0 for none.
        decay: weight decay.
        hidden: matrices for Muon, at four times the rate; all other weights are AdamW's.
        after: called with the step's number after each step.
        prepare: makes the loss's tensors of a step's number and its batch. A GPU then captures the loss as a CUDA graph
            once for each of their shapes, and replays it: the loss must not read their values on the host.

    Returns:
        The modules, or their average.
    """
    rest = [parameter for parameter in modules.parameters() if all(parameter is not matrix for matrix in hidden)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=decay, fused=True)
    ]
    if hidden:
        optimizers.append(Muon(hidden, 4 * rate, weight_decay=decay))
    schedules = [LambdaLR(optimizer, lambda step: _schedule(step, steps)) for optimizer in optimizers]
    averaged = AveragedModel(modules, multi_avg_fn=get_ema_multi_avg_fn(average)) if average else None
    graphed, progress = CudaGraphed(modules, loss), _Progress(name, steps)
    for step, batch in enumerate(batches):
        batch = batch.to(DEVICE, non_blocking=True)
        with torch.autocast(DEVICE, torch.bfloat16, cache_enabled=prepare is None):
            value = graphed(*prepare(step, batch)) if prepare else loss(batch)
        value.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        modules.zero_grad()
        if averaged:
            averaged.update_parameters(modules)
        if after:
            after(step)
        progress.update(step, value)
    return averaged.module if averaged else modules


class CudaGraphed:
    """A loss whose passes a GPU captures and replays: launching small kernels takes longer than running them."""

    def __init__(self, modules: nn.Module, loss: Callable[..., Tensor]) -> None:
        self._modules, self._loss = modules, loss
        self._graphs: dict[tuple[torch.Size, ...], Callable[..., Tensor]] = {}

    def __call__(self, *tensors: Tensor) -> Tensor:
        if DEVICE == "cpu":
            return self._loss(*tensors)
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self._graphs:
            samples, passes = tuple(tensor.clone() for tensor in tensors), _LossModule(self._modules, self._loss)
            self._graphs[shapes] = torch.cuda.make_graphed_callables(passes, samples, allow_unused_input=True)
        return self._graphs[shapes](*tensors)


class _LossModule(nn.Module):
    """A loss with the trained modules inside, as ``make_graphed_callables`` takes it."""

    def __init__(self, modules: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.modules_, self._loss = modules, loss

    def forward(self, *tensors: Tensor) -> Tensor:
        return self._loss(*tensors)


class _Progress:
    """Prints the mean loss twenty times in a training."""

    def __init__(self, name: str, steps: int) -> None:
        self._name, self._steps = name, steps
        self._begin, self._sum = time.monotonic(), torch.zeros((), device=DEVICE)

    def update(self, step: int, loss: Tensor) -> None:
        self._sum += loss.detach()
        every = max(1, self._steps // 20)
        if step % every == every - 1:
            seconds, mean = time.monotonic() - self._begin, self._sum.item() / every
            print(f"{self._name} {step + 1}/{self._steps} loss {mean:.4f} {seconds:.0f} s", flush=True)
            self._sum.zero_()


def _schedule(step: int, steps: int) -> float:
    """The part of the highest learning rate."""
    warm = min(200, steps // 10 + 1)
    return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))) + 0.01)
