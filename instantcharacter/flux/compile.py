"""FLUX's blocks compiled by torch, with the character attention in them: one graph for each of the two kinds."""

from __future__ import annotations

import logging
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from .hooks import has_accelerate_hook, has_diffusers_hooks, without_cache

logger = logging.getLogger(__name__)

RECOMPILE_LIMIT = 64
"""Graphs of each kind of block at the most. torch's own limit, 8, is that of a few sizes of picture, each with and
without a character; past it, blocks could not be compiled."""


class CompiledForward:
    """A block's ``forward``, compiled at its first call; the original one after compiling failed for any block.

    It replaces ``forward``, where ``nn.Module.compile`` would compile the module's hooks too: those that stream the
    block's weights must stay outside of the graph.

    Args:
        forward: of the block.
        failures: the error of the first block that failed to compile, shared by all blocks.
    """

    def __init__(self, forward: Any, failures: list[str]) -> None:
        self.forward = forward
        self._compiled = torch.compile(forward, fullgraph=True)
        self._failures = failures

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._failures:
            return self.forward(*args, **kwargs)
        try:
            return self._compiled(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # torch's own exceptions for compiling are private
            reason = _first_lines(error)
        output = self.forward(*args, **kwargs)  # raises again what was FLUX's error, and not the compiler's
        self._failures.append(reason)
        logger.warning("FLUX runs without being compiled: %s", reason)
        return output


def compile_blocks(transformer: FluxTransformer2DModel) -> bool:
    """Have FLUX's blocks compiled at their first run, which takes about half a minute.

    Another prompt, character, scale or seed compiles nothing anew; another size of picture does, once. torch caches
    compiled code on disk (``TORCHINDUCTOR_CACHE_DIR``), so that another process starts faster. Blocks whose weights
    stream may be compiled too: the hooks that copy weights are outside of the graph. So are those of diffusers'
    caches of whole blocks; with a cache of attention, FLUX runs without being compiled.

    Returns:
        Whether they will be; if not, a warning says why.
    """
    with without_cache(transformer):
        if reason := _obstacle(transformer):
            logger.warning("FLUX runs without being compiled: %s", reason)
            return False
        settings = torch._dynamo.config  # its older name of recompile_limit, which every version knows
        settings.cache_size_limit = max(settings.cache_size_limit, RECOMPILE_LIMIT)
        failures: list[str] = []
        for block in _blocks(transformer):
            if not isinstance(block.forward, CompiledForward):
                block.forward = CompiledForward(block.forward, failures)
    return True


def _blocks(transformer: FluxTransformer2DModel) -> list[nn.Module]:
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def _obstacle(transformer: FluxTransformer2DModel) -> str:
    """The reason for which the blocks cannot be compiled; empty if they can."""
    if getattr(transformer, "is_quantized", False):
        return "its weights are quantised"
    modules = [module for block in _blocks(transformer) for module in block.modules()]
    if any(map(has_diffusers_hooks, modules)):
        return "its weights are stored in fp8, and cast at each layer"
    if any(map(has_accelerate_hook, modules)):
        return 'its layers come one at a time; with another offload strategy than "sequential" they can be'
    return ""


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
