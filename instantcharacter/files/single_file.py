"""A transformers model from one ``.safetensors`` file, as ComfyUI keeps it, or from a folder or the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from .reading import read_safetensors, refuse_code
from .scaled_weights import check_forms, dequantised

WITHOUT_WEIGHTS = (".position_ids", "encoder.embed_tokens.weight")
"""What older files hold in a model's own part beside its weights: numbers from 0 on, and T5's ``shared`` once more."""


@dataclass(frozen=True)
class SingleFileModel:
    """A model: its class, the sizes of the released one, and how to know it in a file.

    Attributes:
        name: what people call it.
        model: its class.
        config: its config's class.
        released: the sizes of the released one.
        prefix: what its keys begin with in a hub file.
        towers: what its keys begin with after the prefix.
        telling: the weight that tells its size, which side of it does, and which setting that is.
    """

    name: str
    model: type[PreTrainedModel]
    config: type[PretrainedConfig]
    released: dict[str, Any]
    prefix: str
    towers: tuple[str, ...]
    telling: tuple[str, int, str]

    @property
    def expected(self) -> str:
        return f"{self.name}'s weights"

    def read_config(self, source: str | Path) -> PretrainedConfig:
        """The sizes of a model: the released ones for a file of their width, else those of the ``config.json`` there.

        Raises:
            ValueError: a file of another model, or of another width with no ``config.json`` beside it.
            OSError: a folder or hub id without one.
        """
        if Path(source).suffix != ".safetensors":
            refuse_code(source)
            return self.config.from_pretrained(source)
        path, released = Path(source), self.config(**self.released)
        weight, side, setting = self.telling
        width = self._own_part(path)[self.prefix + weight].shape[side]
        if width == getattr(released, setting):
            return released
        if not (path.parent / "config.json").is_file():
            raise ValueError(
                f"{path} is of width {width}, {self.name} is of {getattr(released, setting)}. "
                "For another size put its config.json beside it."
            )
        return self.config.from_pretrained(path.parent)

    def load(self, source: str | Path, config: PretrainedConfig, dtype: torch.dtype) -> Any:
        """The model, complete or not at all; weights with a scale beside them are dequantised.

        Raises:
            ValueError: weights that are missing or of other sizes, that the model does not have, or in a form that
                only ComfyUI reads.
        """
        if (path := Path(source)).suffix == ".safetensors":
            state = dequantised(self._own_part(path), dtype, path)
            arguments: dict[str, Any] = {"pretrained_model_name_or_path": None, "state_dict": state}
        else:
            arguments = {"pretrained_model_name_or_path": source}
        try:
            with _without_load_report():
                model, report = self.model.from_pretrained(
                    **arguments, config=config, torch_dtype=dtype, output_loading_info=True
                )
        except RuntimeError as error:  # transformers' word for weights of another size
            raise ValueError(f"{source} does not fit {self.expected}: {error}") from error
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{source} lacks {len(missing)} weights, {missing[0]} first; expected {self.expected}")
        if unused := sorted(key for key in report["unexpected_keys"] if self._counts(key)):
            raise ValueError(
                f"{source} has {len(unused)} weights that {self.name} has no place for, {unused[0]} first; expected "
                f"{self.expected}"
            )
        return model

    def _own_part(self, path: Path) -> dict[str, Tensor]:
        """The model's own weights in a file, under a hub file's keys, whatever else the file holds."""
        tensors, metadata = read_safetensors(path, self.expected)
        towers = tuple(self.prefix + tower for tower in self.towers)
        keyed = {self.prefix + key.removeprefix(self.prefix): tensor for key, tensor in tensors.items()}
        state = {key: tensor for key, tensor in keyed.items() if key.startswith(towers)}
        if self.prefix + self.telling[0] not in state:
            raise ValueError(f"{path} holds {sorted(tensors)[:3]}, not {self.expected}")
        check_forms(state, metadata, path)
        return state

    def _counts(self, key: str) -> bool:
        """Whether a weight that the model has no place for is one of its own towers'."""
        return key.removeprefix(self.prefix).startswith(self.towers) and not key.endswith(WITHOUT_WEIGHTS)


@contextmanager
def _without_load_report() -> Iterator[None]:
    """transformers reports unused weights at length; the unused towers are meant, and missing ones raise here."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
