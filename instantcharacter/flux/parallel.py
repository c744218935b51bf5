"""One picture on several GPUs, by diffusers' context parallelism: each process computes a part of FLUX's tokens.

FLUX's own attention exchanges queries, keys and values between the processes. The image tokens' attention to the
character exchanges nothing: each process has all of the character, and the masks of its own image tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FluxTransformer2DModel
from torch import Tensor, nn


def enable_context_parallel(transformer: FluxTransformer2DModel) -> None:
    """Have all processes of ``torch.distributed`` compute FLUX together, by Ulysses' attention (arXiv 2309.14509).

    Each of them then calls its pipeline with the same settings and seeds, and has the same pictures. Adapters may be
    attached before or after it.

    Raises:
        ValueError: no GPU, or FLUX's attention heads cannot be shared equally.
    """
    processes, heads = dist.get_world_size(), transformer.config.num_attention_heads
    if not torch.accelerator.device_count():  # by which diffusers would divide
        raise ValueError("context parallelism needs a GPU for each process, and this machine has none")
    if heads % processes:
        fitting = [count for count in range(2, heads + 1) if heads % count == 0]
        raise ValueError(f"{processes} processes cannot share FLUX's {heads} attention heads; expected {fitting}")
    transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=processes))


def context_parallel(transformer: nn.Module) -> ContextParallelConfig | None:
    """The context parallelism that diffusers' ``enable_parallelism`` set; None for one GPU."""
    return getattr(getattr(transformer, "_parallel_config", None), "context_parallel_config", None)


def own_part(tokens: Tensor, transformer: nn.Module) -> Tensor:
    """The part of [B, S, C] image tokens that this process computes, as diffusers splits them; all on one GPU."""
    config = context_parallel(transformer)
    if config is None:
        return tokens
    group = config._flattened_mesh.get_group()
    return tokens.tensor_split(dist.get_world_size(group), dim=1)[dist.get_rank(group)]


def sum_of_parts(value: Tensor, transformer: nn.Module) -> Tensor:
    """The sum of a value over the processes that share a picture, the same in all of them."""
    if (config := context_parallel(transformer)) is not None:
        dist.all_reduce(value, group=config._flattened_mesh.get_group())
    return value


def check_shares(transformer: nn.Module, image_tokens: int, text_tokens: int) -> None:
    """Raise ``ValueError`` unless the tokens can be shared equally, and steps are computed alike, in all processes."""
    config = context_parallel(transformer)
    if config is None:
        return
    if transformer.is_cache_enabled:
        raise ValueError(
            "diffusers' caches decide in each process by itself which steps are left out: call disable_cache, and pass "
            "cache_threshold"
        )
    processes = config._flattened_mesh.size()
    if config.ulysses_anything or getattr(config, "ring_anything", False):  # diffusers 0.38 has the first alone
        return
    for count, what in ((image_tokens, "image tokens"), (text_tokens, "text tokens")):
        if count % processes:
            raise ValueError(f"{processes} processes cannot share {count} {what}: change the size, or start fewer")


@contextmanager
def same_pictures(transformer: nn.Module) -> Iterator[None]:
    """Context manager that raises if the processes begin from different noise, of which no picture would come.

    Raises:
        ValueError: in all processes.
    """
    config = context_parallel(transformer)
    if config is None:
        yield
        return
    group = config._flattened_mesh.get_group()

    def check(_: nn.Module, __: tuple, kwargs: dict[str, Any]) -> None:
        handle.remove()  # the first call is enough
        own = kwargs["hidden_states"].double().sum()[None]
        every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, own, group=group)
        if not all(torch.equal(each, own) for each in every):
            raise ValueError("the processes begin from different noise: give each a generator with the same seed")

    handle = transformer.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
