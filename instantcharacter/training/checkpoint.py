"""The files of a training: the state to resume from, and the adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from ..files.atomic import atomic_write
from ..files.errors import first_line, quoted
from ..files.model_config import fitting
from ..files.reading import check_finite, check_weights, read_pickle, unexpected
from ..model.adapter import AdapterConfig, CharacterAdapter
from .flow import CharacterFlow
from .losses import LEVELS

EXPECTED = "the state of a training, which it writes itself: remove the file, or name another output"
STATE, ADAPTER = "state.pt", "adapter.safetensors"
GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
"""Trained weights only, gathered from FSDP's shards into host memory."""


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        step: optimizer steps taken.
        position: samples consumed.
        average: the moving average of the weights, if there is one.
        losses: the sums of :class:`~instantcharacter.training.losses.LossesByLevel`.
    """

    step: int = 0
    position: int = 0
    average: list[Tensor] = field(default_factory=list)
    losses: Tensor = field(default_factory=lambda: torch.zeros(LEVELS, 2))


class Checkpoint:
    """A training's folder; each file in it is replaced as a whole or not at all.

    Args:
        folder: the folder.
        sizes: the adapter's.
        names: names of the trained weights in the flow → in the adapter.
    """

    def __init__(self, folder: Path, sizes: AdapterConfig, names: Mapping[str, str]) -> None:
        self._folder = folder
        self._sizes = sizes
        self._names = names

    @property
    def adapter(self) -> Path:
        return self._folder / ADAPTER

    def save(
        self, accelerator: Accelerator, flow: CharacterFlow, optimizer: torch.optim.Optimizer, progress: Progress
    ) -> None:
        """Write the state and the adapter; every process has to call it."""
        positions = accelerator.gather(torch.tensor([progress.position], device=accelerator.device))
        weights, moments = get_state_dict(flow, optimizer, options=GATHERED)
        if accelerator.is_main_process:
            state = {
                "step": progress.step,
                "positions": positions.tolist(),
                "weights": weights,
                "optimizer": moments,
                "average": progress.average,
                "losses": progress.losses,
            }
            with atomic_write(self._folder / STATE) as partial:
                torch.save(state, partial)
            self._write_adapter({**weights, **dict(zip(self._names, progress.average))})
        accelerator.wait_for_everyone()

    def load(self, accelerator: Accelerator, flow: CharacterFlow, optimizer: torch.optim.Optimizer) -> Progress:
        """Restore weights and moments from the state file; without one, a training is at its beginning.

        Raises:
            ValueError: the state is of an adapter of other sizes, damaged, or has numbers that are not finite.
        """
        path = self._folder / STATE
        if not path.is_file():
            return Progress()
        state = read_pickle(path, EXPECTED)
        shapes = {name: parameter.shape for name, parameter in flow.named_parameters() if name in self._names}
        try:
            for key in ("weights", "optimizer"):
                state[key] = _with_current_names(state[key])
            if {name: weight.shape for name, weight in state["weights"].items()} != shapes:
                raise ValueError(f"{path} is of an adapter of other sizes: remove it, or name another output")
            progress = _progress(state, list(shapes.values()), accelerator)
        except (LookupError, TypeError, AttributeError) as error:
            raise unexpected(
                path, f"lacks a part, or has one of another kind ({first_line(error)})", EXPECTED
            ) from error
        check_weights(state["weights"], path, EXPECTED)
        for tensor in _tensors(state):
            check_finite(tensor, f"{path} has numbers", "its training has failed; remove it, or name another output")
        with fitting(path, EXPECTED):
            set_state_dict(
                flow,
                optimizer,
                model_state_dict=state["weights"],
                optim_state_dict=state["optimizer"],
                options=replace(GATHERED, strict=False),  # FLUX's weights are not in it
            )
        return progress

    def _write_adapter(self, weights: dict[str, Any]) -> None:
        with torch.device("meta"):
            adapter = CharacterAdapter(self._sizes)
        adapter.load_state_dict({self._names[name]: weight for name, weight in weights.items()}, assign=True)
        adapter.save(self.adapter)


def _progress(state: Mapping[str, Any], shapes: list[torch.Size], accelerator: Accelerator) -> Progress:
    """The progress in a state, checked."""
    positions, average, losses = state["positions"], state["average"], state["losses"]
    same = len(positions) == accelerator.num_processes
    position = positions[accelerator.process_index] if same else max(positions)
    progress = Progress(state["step"], position, average, losses)
    if not all(type(number) is int and number >= 0 for number in (progress.step, progress.position)):
        raise TypeError(f"step {quoted(progress.step)}, position {quoted(position)}")
    if losses.shape != Progress().losses.shape or (average and [each.shape for each in average] != shapes):
        raise TypeError("losses, or averages, of another shape")
    return progress


def _tensors(state: Any) -> Iterator[Tensor]:
    """The tensors of numbers in a state, those of bytes aside, which 8-bit optimizers have."""
    if isinstance(state, (dict, list)):
        for item in state.values() if isinstance(state, dict) else state:
            yield from _tensors(item)
    elif isinstance(state, Tensor) and state.is_floating_point():
        yield state


def _with_current_names(state: Any) -> Any:
    """A state with the current names of weights; up to version 0.1.0 the attention lay one level deeper."""
    if isinstance(state, dict):
        return {_with_current_names(key): _with_current_names(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_with_current_names(item) for item in state]
    return state.replace(".attention.attention.", ".attention.") if isinstance(state, str) else state


def names_in_adapter(flow: CharacterFlow, adapter: CharacterAdapter) -> dict[str, str]:
    """Names of the trained weights in the flow → in the adapter, in the order of the flow's parameters."""
    names = {parameter: name for name, parameter in adapter.named_parameters()}
    return {name: names[parameter] for name, parameter in flow.named_parameters() if parameter in names}
