"""Characters on a ComfyUI MODEL, through ComfyUI's own patch points.

A patched MODEL carries its conditionings. At the start of a sampling they become a :class:`SamplingState`. Each call of
FLUX gets a :class:`StepState` from it, with the characters' tokens, and in each block two patches save the query and
add the characters to the attention's output. Both states travel in ComfyUI's ``transformer_options``:
nothing outlives a sampling, and no ``forward`` is replaced.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .checks import check_comfyui, check_flux
from .conditioning import CharacterConditioning
from .internals import (
    apply_model_options,
    has_inner_wrappers,
    is_compiled,
    transformer_options,
    with_transformer_options,
)
from .sampling_state import SamplingState, StepState

KEY = "instantcharacter"
"""The key of everything that this pack puts on a MODEL."""
QUERY = f"{KEY} query"
"""The key of a block's query in ComfyUI's ``extra_options``."""


def apply(model: Any, conditioning: CharacterConditioning) -> Any:
    """A clone of a MODEL with a character added to those that it has.

    Args:
        model: a ComfyUI ``ModelPatcher`` of FLUX.1, in any storage type, with any other patches.
        conditioning: the character. If it has no effect, the clone is the MODEL as it was.

    Raises:
        RuntimeError: ComfyUI is older than its patch points.
        ValueError: the MODEL is not FLUX.1, or a FLUX of another size than the adapter's.
    """
    check_comfyui()
    check_flux(model.model.diffusion_model, conditioning.adapter)
    patched = model.clone()
    if not conditioning.has_effect:
        return patched
    earlier: tuple[CharacterConditioning, ...] = patched.get_attachment(KEY) or ()
    conditionings = (*earlier, conditioning)
    patched.set_attachments(KEY, conditionings)
    if not earlier:
        patched.set_model_attn1_patch(_save_query)
        patched.set_model_attn1_output_patch(_add_characters)
    for point, wrapper in (
        (WrappersMP.OUTER_SAMPLE, partial(_sample, conditionings)),
        (WrappersMP.CALC_COND_BATCH, _save_areas),
        (WrappersMP.APPLY_MODEL, _load_attention),
        (WrappersMP.DIFFUSION_MODEL, _run_step),
    ):
        patched.remove_wrappers_with_key(point, KEY)
        patched.add_wrapper_with_key(point, KEY, wrapper)
    return patched


def _sample(
    conditionings: tuple[CharacterConditioning, ...],
    executor: Any,
    noise: Tensor,
    latent_image: Any,
    sampler: Any,
    sigmas: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Wrapper of the whole sampling; ComfyUI loads the MODEL inside of it."""
    guider = executor.class_obj
    state = SamplingState(conditionings, guider.model_patcher, noise, sigmas)
    guider.model_options["transformer_options"][KEY] = state
    with state.on_device():
        out = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    state.check_applied()
    return out


def _save_areas(executor: Any, model: Any, conds: Any, x_in: Tensor, timestep: Tensor, options: dict[str, Any]) -> Any:
    """Wrapper of a step's prompts: saves the area of the picture that each prompt is for."""
    state = options.get("transformer_options", {}).get(KEY)
    if isinstance(state, SamplingState):
        state.regions.areas = {
            cond["uuid"]: cond.get("area") for prompts in conds for cond in prompts or () if "uuid" in cond
        }
    return executor(model, conds, x_in, timestep, options)


def _load_attention(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrapper around each call of FLUX, compiled or not: loads the weights, once ComfyUI has loaded FLUX's.

    ComfyUI compiles FLUX without guards on its transformer options, and would run a graph again for a MODEL with other
    characters, or with none. An argument that FLUX ignores, named after what the graph depends on, keeps them apart.
    """
    options = apply_model_options(executor, args, kwargs)
    state = options.get(KEY)
    if isinstance(state, SamplingState):
        state.check_device(args[0].device)
        compiled = is_compiled(options)
        state.load_attention(args[0].shape, compiled)
        if compiled:
            kwargs = {**kwargs, state.graph_name: None}
    return executor(*args, **kwargs)


@torch.compiler.disable(recursive=False)
def _run_step(executor: Any, latents: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Wrapper of each call of FLUX."""
    options = transformer_options(executor, args, kwargs)
    state = options.get(KEY)
    if not isinstance(state, SamplingState):
        raise RuntimeError(
            "InstantCharacter: this sampler calls the MODEL without ComfyUI's own sampling around it, so the schedule "
            "is unknown. Use KSampler, SamplerCustom or SamplerCustomAdvanced."
        )
    step = state.step(executor.class_obj, latents, timestep, options)
    args, kwargs = with_transformer_options(executor, args, kwargs, {**options, KEY: step})
    out = executor(latents, timestep, *args, **kwargs)
    state.check_blocks(step, may_be_skipped=has_inner_wrappers(executor))
    return out


def _save_query(q: Tensor, k: Tensor, v: Tensor, *_: Any, extra_options: dict[str, Any], **__: Any) -> dict:
    """ComfyUI's attention patch: saves the block's normalised query, before RoPE."""
    step = extra_options.get(KEY)
    if isinstance(step, StepState):
        step.prefetch(extra_options)
    extra_options[QUERY] = q
    return {}


def _add_characters(attn: Tensor, extra_options: dict[str, Any]) -> Tensor:
    """ComfyUI's attention output patch: adds the characters to the image tokens."""
    step = extra_options.get(KEY)
    if isinstance(step, StepState) and step.adapters:
        step.add(attn, extra_options.pop(QUERY), extra_options)
    return attn
