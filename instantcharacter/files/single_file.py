"""A transformers model from one ``.safetensors`` file, as ComfyUI keeps it, or from a folder or the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from .errors import quoted
from .model_config import NAME, check_size, fitting, read_config, read_settings
from .reading import check_weights, read_safetensors, refuse_code, unexpected
from .scaled_weights import AUXILIARY, check_formats, dequantize

NOT_WEIGHTS = (".position_ids", "encoder.embed_tokens.weight")
"""Ends of keys in older files that are not weights of the model: position indices, and a copy of T5's ``shared``."""


@dataclass(frozen=True)
class SingleFileModel:
    """A transformers model, and its keys in a file.

    Attributes:
        name: for errors.
        model: its class.
        config: the class of its config.
        released: the config of the released model.
        prefix: of all its keys in a hub file.
        prefixes: of its keys, after ``prefix``; other keys in a file belong to other models.
        width_key: the key of a weight, the axis of it that is the model's width, and the width's name in the config.
    """

    name: str
    model: type[PreTrainedModel]
    config: type[PretrainedConfig]
    released: dict[str, Any]
    prefix: str
    prefixes: tuple[str, ...]
    width_key: tuple[str, int, str]

    @property
    def expected(self) -> str:
        return f"{self.name}'s weights"

    def read_config(self, source: str | Path) -> PretrainedConfig:
        """The config of a model.

        Args:
            source: a ``.safetensors`` file, a folder, or a hub id. A file of the released width has the released
                config; another one needs a ``config.json`` beside it.

        Raises:
            ValueError: a file of another model, or of another width without a ``config.json``.
            OSError: a folder or hub id without a ``config.json``.
        """
        if Path(source).suffix != ".safetensors":
            refuse_code(source)
            return self._config_of(Path(source), Path(source)) if Path(source).is_dir() else self._of_hub(source)
        path, released = Path(source), self.config(**self.released)
        key, axis, setting = self.width_key
        width = self._own_weights(path)[self.prefix + key].shape[axis]
        if width == getattr(released, setting):
            return released
        if not (path.parent / NAME).is_file():
            raise ValueError(
                f"{path} is of width {width}, {self.name} is of {getattr(released, setting)}. "
                f"For another size put its {NAME} beside it."
            )
        return self._config_of(path.parent, path)

    def _config_of(self, folder: Path, weights: Path) -> PretrainedConfig:
        """The config in a folder, of a model whose weights are a file or in a folder."""
        settings = read_config(folder / NAME, self.config().to_dict())
        if "vision_config" in settings:  # SigLIP, with its text tower
            read_settings(settings["vision_config"], folder / NAME, self.config().to_dict())
        with fitting(folder / NAME, self.expected):
            config = self.config.from_pretrained(folder)
        check_size(lambda: self.model(config), weights, self.expected)
        return config

    def _of_hub(self, source: str | Path) -> PretrainedConfig:
        return self.config.from_pretrained(source)

    def load(self, source: str | Path, config: PretrainedConfig, dtype: torch.dtype | None) -> Any:
        """Load the model; quantised weights with a scale are dequantised.

        Args:
            source: a ``.safetensors`` file, a folder, or a hub id.
            config: see :meth:`read_config`.
            dtype: of the weights; that of the file if None. Weights that keep theirs are memory-mapped, not copied.

        Raises:
            ValueError: weights that are missing, unknown, of other sizes, or in a format that only ComfyUI reads.
        """
        if (path := Path(source)).suffix == ".safetensors":
            state = self._own_weights(path)
            dtype = dtype or _common_dtype(state)
            state = dequantize(state, dtype, path)
            arguments: dict[str, Any] = {"pretrained_model_name_or_path": None, "state_dict": state}
        else:
            arguments = {"pretrained_model_name_or_path": source}
        with fitting(source, self.expected), _without_load_report():
            model, report = self.model.from_pretrained(
                **arguments, config=config, torch_dtype=dtype or "auto", output_loading_info=True
            )
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{source} lacks {len(missing)} weights, {missing[0]} first; expected {self.expected}")
        if unused := sorted(key for key in report["unexpected_keys"] if self._is_own(key)):
            raise ValueError(
                f"{source} has {len(unused)} weights that {self.name} has no place for, {unused[0]} first; expected "
                f"{self.expected}"
            )
        return model

    def _own_weights(self, path: Path) -> dict[str, Tensor]:
        """The model's own weights in a file, under the keys of a hub file."""
        tensors, metadata = read_safetensors(path, self.expected)
        prefixes = tuple(self.prefix + prefix for prefix in self.prefixes)
        keyed = {self.prefix + key.removeprefix(self.prefix): tensor for key, tensor in tensors.items()}
        state = {key: tensor for key, tensor in keyed.items() if key.startswith(prefixes)}
        key, axis, _ = self.width_key
        if self.prefix + key not in state or state[self.prefix + key].ndim <= axis:
            raise unexpected(path, f"holds {quoted(sorted(tensors)[:3])}, not {self.expected}", self.expected)
        check_formats(state, metadata, path)
        weights = {key: tensor for key, tensor in state.items() if not key.endswith((*NOT_WEIGHTS, *AUXILIARY))}
        check_weights(weights, path, self.expected)
        return state

    def _is_own(self, key: str) -> bool:
        """Whether an unused key is one of this model's weights, not of another model in the file."""
        return key.removeprefix(self.prefix).startswith(self.prefixes) and not key.endswith(NOT_WEIGHTS)


def _common_dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that holds all weights of a file exactly, quantised ones aside; bfloat16 if all are quantised."""
    weights = [tensor for key, tensor in state.items() if key.rpartition(".")[2] not in AUXILIARY]
    dtypes = {tensor.dtype for tensor in weights if tensor.is_floating_point() and tensor.itemsize > 1}
    return reduce(torch.promote_types, dtypes) if dtypes else torch.bfloat16


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Silence transformers' report of unused weights: those of other models are expected, missing ones raise here."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
