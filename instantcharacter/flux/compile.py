"""FLUX's blocks compiled by torch, with the character attention in them: one graph for each of the two kinds."""

from __future__ import annotations

import logging
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn
from torch._dynamo.exc import TorchDynamoException

logger = logging.getLogger(__name__)


class CompiledForward:
    """A block's ``forward``, compiled at its first call; as it was, from the first failure of any block's on.

    Args:
        forward: of the block.
        failed: what went wrong with any of the blocks, shared by them all.
    """

    def __init__(self, forward: Any, failed: list[str]) -> None:
        self.forward = forward
        self._compiled = torch.compile(forward, fullgraph=True)
        self._failed = failed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._failed:
            return self.forward(*args, **kwargs)
        try:
            return self._compiled(*args, **kwargs)
        except TorchDynamoException as error:
            self._failed.append(_first_lines(error))
            logger.warning("FLUX runs without being compiled: %s", self._failed[0])
        return self.forward(*args, **kwargs)


def compile_blocks(transformer: FluxTransformer2DModel) -> bool:
    """Have FLUX's blocks compiled when they first run, which takes about half a minute.

    Another prompt, character, scale or seed needs no more of it; another size of picture does once. torch keeps what it
    compiled on disk (``TORCHINDUCTOR_CACHE_DIR``), so that another process starts faster. Weights that stream may be
    compiled too: what brings them is outside.

    Returns:
        Whether they will be; if not, a warning says why.
    """
    if reason := _in_the_way(transformer):
        logger.warning("FLUX runs without being compiled: %s", reason)
        return False
    failed: list[str] = []
    for block in _blocks(transformer):
        if not isinstance(block.forward, CompiledForward):
            block.forward = CompiledForward(block.forward, failed)
    return True


def _blocks(transformer: FluxTransformer2DModel) -> list[nn.Module]:
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def _in_the_way(transformer: FluxTransformer2DModel) -> str:
    """Why its blocks cannot be compiled."""
    if getattr(transformer, "is_quantized", False):
        return "its weights are quantised"
    modules = [module for block in _blocks(transformer) for module in block.modules()]
    if any(hasattr(module, "_diffusers_hook") for module in modules):
        return "its weights are stored in fp8, and cast at each layer"
    if any(hasattr(module, "_hf_hook") for module in modules):
        return 'its layers come one at a time; with another offload strategy than "sequential" they can be'
    return ""


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
