"""The hooks that diffusers and accelerate put on modules. Neither has a public way to ask for them.

All reads of ``_diffusers_hook`` (diffusers' ``HookRegistry``) and ``_hf_hook`` (accelerate's ``ModelHook``) are here;
``tests/flux/test_hooks.py`` fails if either library stores its hooks elsewhere. So are the private names of the caches
that ``transformer.enable_cache`` makes of such hooks; ``tests/flux/test_diffusers_caches.py`` fails without them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


def has_diffusers_hooks(module: nn.Module) -> bool:
    """Whether diffusers' hooks are on a module itself, as those of layerwise casting to fp8."""
    return hasattr(module, "_diffusers_hook")


def has_accelerate_hook(module: nn.Module) -> bool:
    """Whether an accelerate hook is on a module itself, as that of sequential CPU offloading."""
    return hasattr(module, "_hf_hook")


def drop_empty_registry(module: nn.Module) -> None:
    """Break the reference cycle of module and registry that a diffusers pipeline leaves in a transformer it ran.

    Gigabytes of weights would otherwise stay until Python's garbage collection. A registry with hooks in it stays.
    """
    registry = getattr(module, "_diffusers_hook", None)
    if registry is not None and not registry.hooks:
        del module._diffusers_hook


@contextmanager
def cache_contexts(transformer: Any) -> Iterator[None]:
    """Context manager in which diffusers' caches work in every FLUX pipeline, and which they leave without a state.

    A cache has a state for each prompt, whose name the pipeline sets as the cache's context: diffusers' image-to-image
    and inpainting set none. After a picture that was cancelled or failed, no pipeline of diffusers' resets the state.

    Args:
        transformer: of a pipeline that calls it with ``encoder_hidden_states`` by keyword.
    """
    if not transformer.is_cache_enabled:
        yield
        return
    prompts: list[Tensor] = []
    context = ExitStack()

    def enter(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        prompt = kwargs["encoder_hidden_states"]
        if not any(prompt is known for known in prompts):
            prompts.append(prompt)
        name = next(f"prompt {i}" for i, known in enumerate(prompts) if known is prompt)
        context.enter_context(transformer.cache_context(name))

    handles = [
        transformer.register_forward_pre_hook(enter, with_kwargs=True),
        transformer.register_forward_hook(lambda *_: context.close(), always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        transformer._reset_stateful_cache()


def restart_caches(transformer: Any) -> None:
    """Have diffusers' caches forget the steps before, in the middle of a step that is to be computed again."""
    registries = [vars(module).get("_diffusers_hook") for module in transformer.modules()]
    hooks = [hook for registry in registries if registry for hook in registry.hooks.values()]
    states = [state for hook in hooks for state in vars(hook).values() if hasattr(state, "set_context")]
    contexts = [state._context for state in states]
    if hooks:
        transformer._reset_stateful_cache()
    for state, context in zip(states, contexts):
        state.set_context(context)


@contextmanager
def without_cache(transformer: Any) -> Iterator[None]:
    """Context manager in which diffusers' cache is off and the ``forward`` of each block is the block's own."""
    config = transformer._cache_config
    if config is not None:
        transformer.disable_cache()
    for module in transformer.modules():
        drop_empty_registry(module)
    try:
        yield
    finally:
        if config is not None:
            transformer.enable_cache(config)
