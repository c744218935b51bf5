"""The files of a training: the state to resume from, and the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from ..files.writing import write_pickle
from ..model.adapter import AdapterConfig, CharacterAdapter
from .flow import CharacterFlow
from .losses import LEVELS

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
            write_pickle(self._folder / STATE, state)
            self._write_adapter({**weights, **dict(zip(self._names, progress.average))})
        accelerator.wait_for_everyone()

    def load(self, accelerator: Accelerator, flow: CharacterFlow, optimizer: torch.optim.Optimizer) -> Progress:
        """Restore weights and moments from the state file; without one, a training is at its beginning.

        Raises:
            ValueError: the state is of an adapter of other sizes.
        """
        path = self._folder / STATE
        if not path.is_file():
            return Progress()
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        for key in ("weights", "optimizer"):
            state[key] = _with_current_names(state[key])
        shapes = {name: parameter.shape for name, parameter in flow.named_parameters() if name in self._names}
        if {name: weight.shape for name, weight in state["weights"].items()} != shapes:
            raise ValueError(f"{path} is of an adapter of other sizes: remove it, or name another output")
        set_state_dict(
            flow,
            optimizer,
            model_state_dict=state["weights"],
            optim_state_dict=state["optimizer"],
            options=replace(GATHERED, strict=False),  # FLUX's weights are not in it
        )
        positions = state["positions"]
        same = len(positions) == accelerator.num_processes
        position = positions[accelerator.process_index] if same else max(positions)
        return Progress(state["step"], position, state["average"], state["losses"])

    def _write_adapter(self, weights: dict[str, Any]) -> None:
        with torch.device("meta"):
            adapter = CharacterAdapter(self._sizes)
        adapter.load_state_dict({self._names[name]: weight for name, weight in weights.items()}, assign=True)
        adapter.save(self.adapter)


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
