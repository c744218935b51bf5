"""Processes of a CPU that generate one picture together, each as if it had a GPU of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from diffusers.models import attention_dispatch
from support import recorded

from instantcharacter import Character, InstantCharacterPipeline
from instantcharacter.flux.parallel import enable_context_parallel


def together(processes: int, folder: Path) -> list[dict[str, Any]]:
    """What each of :data:`SCENARIOS` comes to, a picture or an error, in each of several processes."""
    context = torch.multiprocessing.get_context("spawn")
    workers = [context.Process(target=_take_part, args=(rank, processes, folder)) for rank in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(200)
        worker.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def _take_part(rank: int, processes: int, folder: Path) -> None:
    torch.set_num_threads(1)
    with mock.patch("torch.accelerator.device_count", lambda: 1):
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes)
        torch.save({name: _outcome(scenario) for name, scenario in SCENARIOS.items()}, folder / f"{rank}.pt")
        dist.destroy_process_group()


def _outcome(scenario: Callable[[], Any]) -> Any:
    try:
        return scenario()
    except Exception as error:
        return error


def pipeline(parallel: bool = False, first: bool = False) -> InstantCharacterPipeline:
    """The recorded pipeline with its adapter; split over the processes after it, or first."""
    made = InstantCharacterPipeline(**recorded.components())
    made.set_progress_bar_config(disable=True)
    if parallel and first:
        enable_context_parallel(made.transformer)
    made.set_character_adapter(recorded.adapter())
    if parallel and not first:
        enable_context_parallel(made.transformer)
    return made


def characters() -> list[Character]:
    """Two."""
    adapter = recorded.adapter()
    made = [adapter.projector.fuse(*recorded.features(seed=seed)).detach() for seed in (1, 99)]
    return [Character(fused, adapter.fingerprint()) for fused in made]


def masks() -> list[torch.Tensor]:
    """The upper third, and what is below the upper quarter: each process has parts of both."""
    upper, lower = torch.zeros(64, 96), torch.ones(64, 96)
    upper[:21], lower[:16] = 1, 0
    return [upper.numpy(), lower.numpy()]


def settings() -> dict[str, dict[str, Any]]:
    """Ways to generate, by name."""
    one, other = characters()
    return {
        "plain": {},
        "character": {"subject_image": one},
        "two in masks": {"subject_image": [one, other], "subject_mask": masks(), "subject_scale": [1.0, 0.8]},
        "cache": {"subject_image": one, "cache_threshold": 10.0, "num_inference_steps": 8},
        "two prompts": {"subject_image": one, "true_cfg_scale": 2.0, **recorded.negative_prompt()},
    }


def generate(made: InstantCharacterPipeline, **changes: Any) -> torch.Tensor:
    """The latents of the recorded run."""
    return made(**{**recorded.run_settings(), **changes})[0]


def all_settings(first: bool) -> dict[str, torch.Tensor]:
    """The latents of each of :func:`settings`, by processes that share each picture."""
    made = pipeline(parallel=True, first=first)
    return {name: generate(made, **changes) for name, changes in settings().items()}


def offloaded(strategy: str) -> torch.Tensor:
    """The same with the weights offloaded."""
    made = pipeline(parallel=True)
    made.enable_character_offload(strategy, device="cpu")
    return generate(made, subject_image=characters()[0])


def compiled() -> torch.Tensor:
    """The same with compiled blocks."""
    made = pipeline(parallel=True)
    made.enable_character_compile()
    return generate(made, subject_image=characters()[0])


def with_settings(**changes: Any) -> torch.Tensor:
    """A picture with other settings."""
    return generate(pipeline(parallel=True), **changes)


def of_other_noise() -> torch.Tensor:
    """A picture that each process begins from its own noise."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    return generate(pipeline(parallel=True), latents=None, generator=generator)


def out_of_memory() -> torch.Tensor:
    """A picture in which the first process runs out of memory once."""
    made = pipeline(parallel=True)
    made.enable_character_offload("none", device="cpu")
    block = made.transformer.transformer_blocks[1]
    if dist.get_rank() == 0:
        block.register_forward_pre_hook(_fail)
    return generate(made)


def sent_numbers() -> int:
    """How many numbers this process sends to others in a step of FLUX's attention."""
    made, exchange, sent = pipeline(parallel=True), attention_dispatch._all_to_all_single, []

    def counting(numbers: torch.Tensor, group: Any) -> torch.Tensor:
        processes = dist.get_world_size(group)
        sent.append(numbers.numel() * (processes - 1) // processes)  # its own part stays
        return exchange(numbers, group)

    with mock.patch.object(attention_dispatch, "_all_to_all_single", counting):
        generate(made, subject_image=characters()[0], num_inference_steps=1)
    return sum(sent)


def _fail(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def with_diffusers_cache() -> torch.Tensor:
    """A picture with a cache of diffusers' that decides by what it sees of the tokens."""
    from diffusers import FirstBlockCacheConfig

    made = pipeline(parallel=True)
    made.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    return generate(made)


SCENARIOS: dict[str, Callable[[], Any]] = {
    "adapter first": partial(all_settings, first=False),
    "parallel first": partial(all_settings, first=True),
    **{strategy: partial(offloaded, strategy) for strategy in ("none", "stream", "sequential")},
    "compiled": compiled,
    "9 image tokens": partial(with_settings, height=48, width=48, latents=None),
    "9 text tokens": partial(with_settings, prompt_embeds=torch.zeros(1, 9, 64)),
    "noise": of_other_noise,
    "cache": with_diffusers_cache,
    "traffic": sent_numbers,
    "memory": out_of_memory,  # the last: the processes are no longer in step
}
