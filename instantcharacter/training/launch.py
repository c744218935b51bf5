"""Loads the models and runs trainings, one stage after the other."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import FluxTransformer2DModel
from tqdm import tqdm

from ..model.adapter import CharacterAdapter
from .checkpoint import check_output
from .config import TrainingConfig
from .data.cache import MemoryCache
from .data.examples import Examples, new_memory_cache
from .flow import zero_values
from .trainer import OnStep, Trainer


def train(*stages: TrainingConfig, on_step: OnStep | None = None) -> Path:
    """Train an adapter, or resume the trainings in the stages' folders; see :class:`TrainingConfig`.

    Args:
        *stages: one training or several, one after the other; their cache in memory is the first one's.
        on_step: called after each step with its number and loss.

    Returns:
        The last stage's adapter file.

    Raises:
        FileNotFoundError, ValueError: models or samples are missing or not of the expected kind, or a loss or a weight
            is not finite; the last good states stay.
        OSError: an output cannot be written, or has an adapter of another origin.
        RuntimeError: the GPU's memory is too small.
        KeyboardInterrupt: it was interrupted; the state is saved.
    """
    for config in stages:
        check_output(config.output, config.keep_states)
    memory: MemoryCache | None = None
    try:
        for config in stages:
            accelerator = Accelerator(
                mixed_precision="bf16" if config.precision == "bfloat16" else "no",
                log_with="tensorboard",
                project_dir=config.output,
            )
            memory = new_memory_cache(config, accelerator.device) if memory is None else memory
            path = _load_trainer(config, accelerator, memory, on_step).run()
            accelerator.free_memory()  # a stage's models and their hooks are in reference cycles
        accelerator.state.destroy_process_group()
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            "the GPU's memory is too small for this training: try optimizer adamw8bit, a smaller batch_size and more "
            "to accumulate, or a filled cache"
        ) from error
    return path


def prepare(config: TrainingConfig, samples: int) -> None:
    """Fill the cache for the first ``samples`` samples, so that the training loads neither text nor vision encoders.

    Raises:
        ValueError: the config names no cache.
    """
    if config.cache is None:
        raise ValueError("there is no cache to fill: name a folder for it in the config")
    examples = Examples(config, Accelerator().device)
    examples.warm_fixed_entries()
    batches = examples.batches(0)
    for _ in tqdm(range(-(-samples // config.batch_size)), desc="cache"):
        next(batches)


def _load_trainer(
    config: TrainingConfig, accelerator: Accelerator, memory: MemoryCache, on_step: OnStep | None
) -> Trainer:
    transformer = FluxTransformer2DModel.from_pretrained(
        config.model, subfolder="transformer", torch_dtype=getattr(torch, config.precision)
    )
    adapter = CharacterAdapter.from_file(config.adapter) if config.adapter else _new_adapter(config)
    rank, processes = accelerator.process_index, accelerator.num_processes
    examples = Examples(config, accelerator.device, rank, processes, memory)
    return Trainer(config, accelerator, transformer, adapter, examples, on_step)


def _new_adapter(config: TrainingConfig) -> CharacterAdapter:
    torch.manual_seed(config.seed)
    return zero_values(CharacterAdapter(config.sizes))
