"""A diffusers folder of FLUX, checked before anything in it is loaded."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTextModel, PretrainedConfig, T5EncoderModel

from ..files.errors import escaped, quoted
from ..files.model_config import NAME, check_size, read_config
from ..files.reading import read_json, refuse_code, unexpected
from .parts import CLIP_L, EXPECTED_FLUX, EXPECTED_VAE, T5_XXL
from .variants import FLUX_1, INPUT, check_variant

PARTS: dict[str, Any] = {
    "transformer": FluxTransformer2DModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": T5EncoderModel,
}
"""The models of a diffusers folder, by their names in ``model_index.json``."""
TEXT_ENCODERS = {"text_encoder": CLIP_L, "text_encoder_2": T5_XXL}
NONE = {name: (None, [None, None]) for name in ("vae", "text_encoder", "text_encoder_2")}
"""What stands for a model that a folder does not have."""


def check_folder(folder: Path) -> dict[str, PretrainedConfig]:
    """Check a diffusers folder before anything in it is loaded.

    Returns:
        The configs of its text encoders, by their names in :data:`TEXT_ENCODERS`.

    Raises:
        ValueError: it is no FLUX.1, an unsupported kind of FLUX, or has code of its own, which diffusers before 0.38
            would run.
    """
    index = read_json(folder / "model_index.json")
    parts = {name: value for name, value in index.items() if isinstance(value, (list, dict)) or name == "_class_name"}
    kind = parts.pop("_class_name", None)
    foreign = [name for name, value in parts.items() if not _of_a_library(value)]
    if not isinstance(kind, str) or foreign:
        name = foreign[0] if isinstance(kind, str) else "_class_name"
        entry = f"{quoted(name)}: {quoted(index.get(name))} in model_index.json"
        raise ValueError(
            f"{escaped(folder)} wants code run that is not diffusers' or transformers' ({entry}), which it is not: "
            "take FLUX.1 from where it was released"
        )
    for name, model in PARTS.items():
        if parts.get(name) not in ([model.__module__.partition(".")[0], model.__name__], *NONE.get(name, ())):
            its = "" if name == "transformer" else f", its {name} is {quoted(parts[name])}"
            raise unexpected(folder, f"is a {quoted(kind)}{its}", EXPECTED_FLUX)
    for name in parts:
        refuse_code(folder / name)
    config = read_config(folder / "transformer" / NAME, defaults(FluxTransformer2DModel))
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        raise ValueError(
            f"{folder} is quantised by {quoted(method)}, which InstantCharacter does not read: {FLUX_1} in GGUF"
        )
    check_variant({INPUT[1]: (0, config.get("in_channels", 64))}, folder)
    read_config(folder / "scheduler/scheduler_config.json", defaults(FlowMatchEulerDiscreteScheduler))
    check_size(lambda: FluxTransformer2DModel.from_config(config), folder / "transformer", EXPECTED_FLUX)
    if parts.get("vae"):
        vae = read_config(folder / "vae" / NAME, defaults(AutoencoderKL))
        check_size(lambda: AutoencoderKL.from_config(vae), folder / "vae", EXPECTED_VAE)
    there = {name: model for name, model in TEXT_ENCODERS.items() if parts.get(name, [None])[0]}
    return {name: model.read_config(folder / name) for name, model in there.items()}


def defaults(model: Any) -> dict[str, Any]:
    """The settings of a class of diffusers, and their defaults."""
    parameters = inspect.signature(model.__init__).parameters
    return {name: None if p.default is p.empty else p.default for name, p in parameters.items()}


def _of_a_library(value: Any) -> bool:
    """Whether an entry of ``model_index.json`` is ``[library, class]`` of a trusted library, or of none."""
    return isinstance(value, list) and len(value) == 2 and value[0] in ("diffusers", "transformers", None)
