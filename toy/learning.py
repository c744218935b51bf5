"""What the toy trainings share: optimisers with their schedule, a moving average, a line of progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MOMENTUM = 0.95
"""Of Muon."""
torch.backends.cuda.enable_cudnn_sdp(False)  # its backward fails at heads of 32 (torch 2.11, H100)


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
    given: Callable[[int, Tensor], tuple[Tensor, ...]] | None = None,
) -> nn.Module:
    """AdamW or Muon with a warm-up and a cosine; bfloat16 arithmetic, float32 weights.

    Args:
        name: at the head of the lines of progress.
        modules: what learns.
        batches: indices of what to learn from, one batch a step.
        steps: how many.
        loss: of a batch, or of what ``given`` makes of it.
        rate: the highest learning rate.
        average: decay of the moving average of the weights; 0 for none.
        decay: weight decay.
        hidden: matrices that learn by Muon, at four times the rate, in place of AdamW.
        after: called with the step's number after each.
        given: makes tensors of a step's number and its batch. What the loss does with them is then recorded on a GPU,
            once for each of their shapes, and replayed: it must not ask for their values.

    Returns:
        The modules, or their average.
    """
    rest = [parameter for parameter in modules.parameters() if all(parameter is not matrix for matrix in hidden)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=decay, fused=True)
    ]
    if hidden:
        optimizers.append(Muon(hidden, 4 * rate, weight_decay=decay))
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: _rate(step, steps)) for o in optimizers]
    averaged = AveragedModel(modules, multi_avg_fn=get_ema_multi_avg_fn(average)) if average else None
    began, shown = time.monotonic(), torch.zeros((), device=DEVICE)
    recorded = Recorded(modules, loss)
    for step, batch in enumerate(batches):
        batch = batch.to(DEVICE, non_blocking=True)
        with torch.autocast(DEVICE, torch.bfloat16, cache_enabled=given is None):
            value = recorded(*given(step, batch)) if given else loss(batch)
        value.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        modules.zero_grad()
        if averaged:
            averaged.update_parameters(modules)
        if after:
            after(step)
        shown += value.detach()
        every = max(1, steps // 20)
        if step % every == every - 1:
            seconds = time.monotonic() - began
            print(f"{name} {step + 1}/{steps} loss {shown.item() / every:.4f} {seconds:.0f} s", flush=True)
            shown.zero_()
    return averaged.module if averaged else modules


class Recorded:
    """A loss whose passes, forward and backward, a GPU replays: a host launches small kernels slower than they run."""

    def __init__(self, modules: nn.Module, loss: Callable[..., Tensor]) -> None:
        self._modules, self._loss = modules, loss
        self._graphs: dict[tuple[torch.Size, ...], Callable[..., Tensor]] = {}

    def __call__(self, *given: Tensor) -> Tensor:
        if DEVICE == "cpu":
            return self._loss(*given)
        shapes = tuple(tensor.shape for tensor in given)
        if shapes not in self._graphs:
            samples, passes = tuple(tensor.clone() for tensor in given), _Passes(self._modules, self._loss)
            self._graphs[shapes] = torch.cuda.make_graphed_callables(passes, samples, allow_unused_input=True)
        return self._graphs[shapes](*given)


class _Passes(nn.Module):
    """A loss with what learns by it, as PyTorch records it."""

    def __init__(self, modules: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.modules_, self._loss = modules, loss

    def forward(self, *given: Tensor) -> Tensor:
        return self._loss(*given)


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with ``match_rms_adamw``, all matrices of a shape at once: a small model has many of them.

    A convolution's kernel is a matrix of as many rows as it has outputs.

    Source: https://kellerjordan.github.io/posts/muon; arXiv 2502.16982 for the rate.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                alike.setdefault(matrix.shape, []).append(matrix)
            for matrices in alike.values():
                gradients = torch.stack([matrix.grad for matrix in matrices])
                average = self.state[matrices[0]].setdefault("average", torch.zeros_like(gradients))
                average.lerp_(gradients, 1 - MOMENTUM)
                turn = _orthogonal(gradients.lerp_(average, MOMENTUM).flatten(2))
                rate = group["lr"] * 0.2 * math.sqrt(max(turn.shape[1:]))
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, turn.view_as(gradients).unbind(), alpha=-rate)


def _orthogonal(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrix of each, about, by five steps of Newton and Schulz; [N, R, C]."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        squared = x @ x.mT
        x = 3.4445 * x + (-4.775 * squared + 2.0315 * squared @ squared) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def _rate(step: int, steps: int) -> float:
    warm = min(200, steps // 10 + 1)
    return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))) + 0.01)
