"""The settings of one call of a FLUX pipeline, all checked before any weight moves.

What diffusers' own ``check_inputs`` says well is left to it, and said as early. The numbers, texts, tensors and
pictures that it lets through are checked here: below, they end in errors of torch, or in a wrong picture without any.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ..model.tensors import check_tensor
from ..values import check_choice, check_count, check_number, shown
from .attn_processor import compute_dtype
from .init_pictures import check_init_pictures
from .parallel import check_shares
from .sweep import BOUNDS

COUNTS = {
    "num_inference_steps": (1, 100_000),
    "num_images_per_prompt": (1, 1024),
    "max_sequence_length": (1, 512),
    "width": (16, 16384),
    "height": (16, 16384),
}
NUMBERS: dict[str, tuple[float, float]] = {
    "guidance_scale": BOUNDS["guidance"][1:],
    "true_cfg_scale": (0, 100),
    "strength": (0, 1),
}
"""Least and greatest value of the settings that are numbers; a side that is None is 1024 pixels."""
LORA_SCALE = (-100, 100)
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PREFIXES = ("", "negative_")
TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
RESERVED = {"attn", "hidden_states", "encoder_hidden_states", "image_rotary_emb", "subjects", "image_tokens"}
"""Arguments of the attention processors that FLUX and this package pass."""


def bind(call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """The arguments of a pipeline's call with their defaults; one picture a prompt for None, which diffusers allows.

    Raises:
        TypeError: arguments that the call does not take.
    """
    try:
        bound = inspect.signature(call).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"the pipeline does not take these arguments: {error}") from error
    bound.apply_defaults()
    if bound.arguments["num_images_per_prompt"] is None:
        bound.arguments["num_images_per_prompt"] = 1
    if (callback := bound.arguments["callback_on_step_end"]) is not None:
        bound.arguments["callback_on_step_end"] = _with_checked_result(callback)
    return bound


def check_settings(pipeline: Any, settings: Mapping[str, Any]) -> None:
    """Check all arguments of a call.

    Args:
        pipeline: of diffusers'.
        settings: from :func:`bind`.

    Raises:
        ValueError: a setting of another type, shape or range than expected, or settings that contradict each other.
    """
    _check_numbers(pipeline, settings)
    for name in TEXTS:
        _check_text(name, settings[name])
    for prefix in PREFIXES:
        _check_embeddings(pipeline, settings, prefix)
    _check_outputs(pipeline, settings)
    _check_steps(settings)
    _check_diffusers(pipeline, settings)
    pictures = _pictures(settings)
    lengths = _check_prompts(pipeline, settings, pictures)
    _check_generator(settings["generator"], pictures)
    _check_latents(pipeline, settings, pictures)
    channels, height, width = latents_shape(pipeline, settings)
    for length in lengths:
        check_shares(pipeline.transformer, height * width // 4, length)
    if "image" in settings:
        check_init_pictures(settings, (channels, height, width), pictures)


def side(pipeline: Any, length: int | None) -> int:
    """Width or height of a picture in pixels; None stands for the pipeline's default."""
    return pipeline.default_sample_size * pipeline.vae_scale_factor if length is None else length


def latents_shape(pipeline: Any, settings: Mapping[str, Any]) -> tuple[int, int, int]:
    """Channels, height and width of a picture's latents."""
    height, width = (side(pipeline, settings[name]) // pipeline.vae_scale_factor for name in ("height", "width"))
    return pipeline.transformer.config.in_channels // 4, height, width


def prompt_length(pipeline: Any, asked: int) -> int:
    """Tokens of a prompt for T5: no more than its tokenizer allows, and FLUX.1-schnell learned with."""
    longest = pipeline.tokenizer_2.model_max_length
    guided = pipeline.transformer.config.guidance_embeds
    return min(asked, longest if guided else SCHNELL_T5_LENGTH, longest)


SCHNELL_T5_LENGTH = 256
"""The most T5 tokens of a prompt for FLUX.1-schnell, which has no guidance embedding."""


def _check_numbers(pipeline: Any, settings: Mapping[str, Any]) -> None:
    for name, bounds in COUNTS.items():
        if settings[name] is not None or name not in ("width", "height"):
            check_count(name, settings[name], *bounds)
    for name, (low, high) in NUMBERS.items():
        if name in settings:
            check_number(name, settings[name], low, high)
    token = 2 * pipeline.vae_scale_factor
    for name in ("width", "height"):
        if side(pipeline, settings[name]) % token:
            raise ValueError(f"{name} is {settings[name]}; expected a multiple of {token} pixels")


def _check_text(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless a value is None, a text, or a list of texts that is not empty."""
    texts = value if isinstance(value, list) else [value]
    if value is not None and not (texts and all(isinstance(text, str) for text in texts)):
        raise ValueError(f"{name} is {shown(value)}; expected a text, or a list with a text for each picture")
    for text in filter(None, texts):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"{name} is {shown(text)}; it has half of a letter in it, which is no text: write it anew")


def _check_outputs(pipeline: Any, settings: Mapping[str, Any]) -> None:
    check_choice("output_type", settings["output_type"], OUTPUT_TYPES)
    if not isinstance(settings["return_dict"], int):
        raise ValueError(f"return_dict is {shown(settings['return_dict'])}; expected True or False")
    names, callback = settings["callback_on_step_end_tensor_inputs"], settings["callback_on_step_end"]
    if not (isinstance(names, (list, tuple)) or (names is None and callback is None)):
        raise ValueError(f"callback_on_step_end_tensor_inputs is {shown(names)}; expected a list such as ['latents']")
    _check_attention_settings(pipeline, settings["joint_attention_kwargs"])
    has_ip_adapter = getattr(pipeline.transformer, "encoder_hid_proj", None) is not None
    for name in (name for name, value in settings.items() if "ip_adapter" in name and value is not None):
        if not has_ip_adapter:
            raise ValueError(f"{name} is {shown(settings[name])}, and no IP-Adapter is loaded: leave it out")


def _check_attention_settings(pipeline: Any, joint: Any) -> None:
    if joint is None:
        return
    if not isinstance(joint, dict) or not all(isinstance(name, str) for name in joint):
        raise ValueError(f"joint_attention_kwargs is {shown(joint)}; expected a dict of names and values")
    has_ip_adapter = getattr(pipeline.transformer, "encoder_hid_proj", None) is not None
    for name in joint:
        if name in RESERVED or ("ip_" in name and not has_ip_adapter):
            raise ValueError(f"joint_attention_kwargs has {shown(name)}, which FLUX sets itself: leave it out")
    if joint.get("scale") is not None:
        check_number("joint_attention_kwargs['scale']", joint["scale"], *LORA_SCALE)


def _check_diffusers(pipeline: Any, settings: Mapping[str, Any]) -> None:
    """Raise early, and by name, what diffusers' own check says."""
    sides = {name: side(pipeline, settings[name]) for name in ("width", "height")}
    names = inspect.signature(pipeline.check_inputs).parameters
    try:
        pipeline.check_inputs(**{name: {**settings, **sides}[name] for name in names})
    except ValueError as error:
        raise ValueError(f"diffusers refuses these settings: {error}") from error


def _check_steps(settings: Mapping[str, Any]) -> None:
    sigmas, steps = settings["sigmas"], settings["num_inference_steps"]
    if sigmas is not None:
        is_list = isinstance(sigmas, (list, tuple)) or (isinstance(sigmas, np.ndarray) and sigmas.ndim == 1)
        if not is_list or not 1 <= len(sigmas) <= COUNTS["num_inference_steps"][1]:
            raise ValueError(f"sigmas is {shown(sigmas)}; expected a list of falling numbers, such as [1, 0.75, 0.5]")
        for sigma in sigmas:
            check_number("a value of sigmas", sigma, 1e-6, 1)
        if not all(one > other for one, other in pairwise(sigmas)):
            raise ValueError(f"sigmas is {shown(sigmas)}; expected numbers that fall from step to step")
        steps = len(sigmas)
    strength = settings.get("strength", 1)
    if int(steps - min(steps * strength, steps)) == steps:
        raise ValueError(f"strength {strength} of {steps} steps leaves no step: expected a greater one, or more steps")


def _pictures(settings: Mapping[str, Any]) -> int:
    """The number of pictures that are generated at once."""
    prompts = settings["prompt_embeds"] if settings["prompt"] is None else _as_texts(settings["prompt"])
    return len(prompts) * settings["num_images_per_prompt"]


def _check_prompts(pipeline: Any, settings: Mapping[str, Any], pictures: int) -> set[int]:
    """Check that there are encoders for prompt and negative prompt, and as many of them as of pictures.

    Returns:
        Their lengths in tokens.
    """
    lengths = set()
    for prefix in PREFIXES if settings["true_cfg_scale"] > 1 else PREFIXES[:1]:
        texts, embeddings = (
            [settings[f"{prefix}{name}"] for name in ("prompt", "prompt_2")],
            settings[f"{prefix}prompt_embeds"],
        )
        if embeddings is not None:
            _check_rows(f"{prefix}prompt_embeds", len(embeddings), pictures)
            lengths.add(embeddings.shape[1])
        elif texts[0] is not None:
            _check_encoders(pipeline, prefix)
            for text in filter(None, texts):
                _check_rows(f"{prefix}prompt", len(_as_texts(text)) * settings["num_images_per_prompt"], pictures)
            lengths.add(prompt_length(pipeline, settings["max_sequence_length"]))
    if "image" in settings and len(lengths) > 1:
        raise ValueError(f"prompt and negative prompt have {sorted(lengths)} tokens; expected as many of both")
    return lengths


def _check_embeddings(pipeline: Any, settings: Mapping[str, Any], prefix: str) -> None:
    names = f"{prefix}prompt_embeds", f"{prefix}pooled_prompt_embeds"
    embeddings, pooled = (settings[name] for name in names)
    if embeddings is None and pooled is None:
        return
    config, dtype = pipeline.transformer.config, compute_dtype(pipeline.transformer)
    check_tensor(names[0], embeddings, (None, None, config.joint_attention_dim), dtype)
    check_tensor(names[1], pooled, (len(embeddings), config.pooled_projection_dim), dtype)


def _check_encoders(pipeline: Any, prefix: str) -> None:
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    if missing := [name for name in names if getattr(pipeline, name) is None]:
        raise ValueError(
            f"the pipeline has no {missing[0]}, so that it encodes no {prefix}prompt: pass {prefix}prompt_embeds and "
            f"{prefix}pooled_prompt_embeds"
        )


def _check_rows(name: str, rows: int, pictures: int) -> None:
    if rows not in (1, pictures):
        raise ValueError(f"{name} is for {rows} pictures, and {pictures} are asked for; expected one for all or each")


def _check_generator(generator: Any, pictures: int) -> None:
    if not isinstance(generator, list):
        if not (generator is None or isinstance(generator, torch.Generator)):
            raise ValueError(f"generator is {shown(generator)}; expected a torch.Generator, or a list of them")
        return
    if not all(isinstance(each, torch.Generator) for each in generator) or len(generator) != pictures:
        raise ValueError(
            f"generator is {shown(generator)}; expected one torch.Generator for each of {pictures} pictures"
        )


def _check_latents(pipeline: Any, settings: Mapping[str, Any], pictures: int) -> None:
    if settings["latents"] is None:
        return
    channels, height, width = latents_shape(pipeline, settings)
    if "mask_image" in settings:  # inpainting takes them as the VAE does, the others as FLUX does
        dtype = compute_dtype(pipeline.transformer)
        check_tensor("latents", settings["latents"], (pictures, channels, height, width), dtype)
    else:
        check_tensor("latents", settings["latents"], (pictures, height * width // 4, channels * 4))


def _as_texts(prompt: str | list[str]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else prompt


def _with_checked_result(callback: Any) -> Callable[..., dict[str, Any]]:
    """A callback of the steps whose result is checked: what is no dict ends the pipeline with an error of Python's.

    Raises:
        ValueError: it is not callable.
    """
    if not callable(callback):
        raise ValueError(f"callback_on_step_end is {shown(callback)}; expected a function")

    def checked(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        result = callback(pipeline, step, timestep, tensors)
        if not isinstance(result, dict):
            raise ValueError(f"callback_on_step_end returned {shown(result)}; expected a dict such as the one it gets")
        for name in {"latents", "prompt_embeds"} & result.keys():
            tensor = result[name]
            if not isinstance(tensor, torch.Tensor) or tensor.shape != shapes.get(name, tensor.shape):
                raise ValueError(f"callback_on_step_end returned {name} {shown(tensor)}; expected a tensor as it gets")
        return result

    return checked
