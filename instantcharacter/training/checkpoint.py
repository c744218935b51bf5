"""The files of a training: the states to resume from, and the adapter."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from ..files.atomic import check_writable
from ..files.errors import quoted
from ..files.model_config import fitting
from ..files.reading import check_finite, check_weights, read_pickle, unexpected
from ..files.writing import write_pickle
from ..model.adapter import AdapterConfig, CharacterAdapter
from .flow import CharacterFlow
from .losses import LEVELS

logger = logging.getLogger(__name__)

STATE, ADAPTER = "state.pt", "adapter.safetensors"
EXPECTED = "the state of a training, which it writes itself"
PARTS = {"step": int, "positions": list, "weights": dict, "optimizer": dict, "average": list, "losses": Tensor}
"""What a state holds, and of which types."""
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
        states: how many states it keeps.
        sizes: the adapter's.
        names: names of the trained weights in the flow → in the adapter.
    """

    def __init__(self, folder: Path, states: int, sizes: AdapterConfig, names: Mapping[str, str]) -> None:
        self._folder = folder
        self._states = state_files(folder, states)
        self._sizes = sizes
        self._names = names

    @property
    def adapter(self) -> Path:
        return self._folder / ADAPTER

    @property
    def is_complete(self) -> bool:
        """Whether the adapter is not older than the newest state: a killed process may have written the state alone."""
        newest = next(path for path in self._states if path.is_file())
        return self.adapter.is_file() and self.adapter.stat().st_mtime_ns >= newest.stat().st_mtime_ns

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
            self._write_state(state)
            self._write_adapter({**weights, **dict(zip(self._names, progress.average))})
        accelerator.wait_for_everyone()

    def load(self, accelerator: Accelerator, flow: CharacterFlow, optimizer: torch.optim.Optimizer) -> Progress:
        """Restore weights and moments from the newest good state; without any, a training is at its beginning.

        Raises:
            ValueError: no state is good, or it is of an adapter of other sizes.
        """
        paths = [path for path in self._states if path.is_file()]
        if not paths:
            return Progress()
        path, state = _newest_good(paths)
        shapes = {name: parameter.shape for name, parameter in flow.named_parameters() if name in self._names}
        if {name: weight.shape for name, weight in state["weights"].items()} != shapes:
            raise ValueError(f"{path} is of an adapter of other sizes: remove it, or name another output")
        with fitting(path, EXPECTED):
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

    def _write_state(self, state: dict[str, Any]) -> None:
        """Write a state beside the others, and only then let each take the name of the one before it."""
        written = self._folder / f"next.{STATE}"
        write_pickle(written, state)
        for older, path in zip(self._states[::-1], [*self._states[-2::-1], written]):
            if path.is_file():
                path.replace(older)

    def _write_adapter(self, weights: dict[str, Any]) -> None:
        with torch.device("meta"):
            adapter = CharacterAdapter(self._sizes)
        adapter.load_state_dict({self._names[name]: weight for name, weight in weights.items()}, assign=True)
        adapter.save(self.adapter)


def check_output(folder: Path, states: int) -> None:
    """Raise ``OSError`` unless a training can write into a folder without replacing what is not its own."""
    check_writable(folder / STATE)
    if (folder / ADAPTER).exists() and not any(path.is_file() for path in state_files(folder, states)):
        raise FileExistsError(
            f"{folder / ADAPTER} is there already, without the {STATE} of its training: move it, or name another output"
        )


def state_files(folder: Path, states: int) -> list[Path]:
    """The paths of a training's states, the newest first."""
    return [folder / STATE, *(folder / f"{Path(STATE).stem}.{number}.pt" for number in range(1, states))]


def _newest_good(paths: list[Path]) -> tuple[Path, dict[str, Any]]:
    """The first state that can be read and is finite, and its path."""
    faults: list[ValueError] = []
    for path in paths:
        try:
            state = _read_state(path)
        except ValueError as error:
            faults.append(error)
            continue
        if faults:
            logger.warning("%s The training goes on from %s, step %d.", faults[0], path.name, state["step"])
        return path, state
    raise ValueError(f"{faults[0]} No other state is good: name another output to begin anew.") from faults[0]


def _read_state(path: Path) -> dict[str, Any]:
    """The content of a state's file, with current names; raises ``ValueError`` unless it is whole and finite."""
    state = read_pickle(path, EXPECTED)
    parts = {name: type(part) for name, part in state.items()} if isinstance(state, dict) else {}
    if wrong := [name for name, kind in PARTS.items() if not issubclass(parts.get(name, type(None)), kind)]:
        raise unexpected(path, f"lacks {', '.join(wrong)}, or has other kinds of them", EXPECTED)
    for key in ("weights", "optimizer"):
        state[key] = _with_current_names(state[key])
    check_weights(state["weights"], path, EXPECTED)
    counts, average = [state["step"], *state["positions"]], state["average"]
    if len(counts) < 2 or not all(type(count) is int and count >= 0 for count in counts):
        raise unexpected(path, f"has step {quoted(counts[0])} and positions {quoted(counts[1:])}", EXPECTED)
    sizes = [[weight.shape for weight in weights] for weights in (state["weights"].values(), _tensors(average))]
    if len(sizes[1]) != len(average) or (average and sorted(sizes[0]) != sorted(sizes[1])):
        raise unexpected(path, "has averages that are not those of its weights", EXPECTED)
    if state["losses"].shape != Progress().losses.shape:
        raise unexpected(path, f"has losses {list(state['losses'].shape)}", EXPECTED)
    for tensor in _tensors(state):
        check_finite(tensor, f"{path} has numbers", "its training diverged")
    return state


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
