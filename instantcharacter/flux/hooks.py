"""The hooks that diffusers and accelerate put on modules. Neither has a public way to ask for them.

All reads of ``_diffusers_hook`` (diffusers' ``HookRegistry``) and ``_hf_hook`` (accelerate's ``ModelHook``) are here;
``tests/flux/test_hooks.py`` fails if either library stores its hooks elsewhere.
"""

from __future__ import annotations

from torch import nn


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
