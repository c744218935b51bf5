"""The training itself: steps, what is written about them, and states to go on from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.utils._pytree import tree_map
from tqdm import tqdm

from ..files.atomic import atomic_write
from ..model.adapter import CharacterAdapter
from .config import TrainingConfig
from .examples import Batch, Examples, Held, in_order
from .flow import CharacterFlow, draw, new_adapter
from .objective import add_noise, draw_sigmas, positions, velocity_losses
from .stopping import stop_requests

STATE, ADAPTER = "state.pt", "adapter.safetensors"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
"""What is learned, put together where it is in pieces."""
VAE_SCALE = 8
"""Pixels of a latent's side, in FLUX.1."""
LEVELS = 10
"""The noise levels' ranges whose losses are told apart."""


def train(*stages: TrainingConfig) -> Path:
    """Train an adapter, or go on where a training in the same folders was left; see :class:`TrainingConfig`.

    Args:
        *stages: one training or several, one after the other; what they hold in memory is read once for all.

    Returns:
        The last one's adapter file.

    Raises:
        FileNotFoundError, ValueError: models or samples that are not there or not what they should be.
        RuntimeError: the GPU's memory is too small.
        KeyboardInterrupt: it was interrupted; the state is saved.
    """
    held: Held | None = None
    try:
        for config in stages:
            accelerator = Accelerator(
                mixed_precision="bf16" if config.precision == "bfloat16" else "no",
                log_with="tensorboard",
                project_dir=config.output,
            )
            held = held or Held(config, accelerator.device)
            path = _trainer(config, accelerator, held).run()
            accelerator.free_memory()  # a stage's models and their hooks are in cycles
        accelerator.state.destroy_process_group()
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            "the GPU's memory is too small for this training: try optimizer adamw8bit, a smaller batch_size and more "
            "to accumulate, or a filled cache"
        ) from error
    return path


def _trainer(config: TrainingConfig, accelerator: Accelerator, held: Held) -> Trainer:
    transformer = FluxTransformer2DModel.from_pretrained(
        config.model, subfolder="transformer", torch_dtype=getattr(torch, config.precision)
    )
    adapter = CharacterAdapter.from_file(config.adapter) if config.adapter else _new(config)
    examples = Examples(config, accelerator.device, accelerator.process_index, accelerator.num_processes, held)
    return Trainer(config, accelerator, transformer, adapter, examples)


def prepare(config: TrainingConfig, samples: int) -> None:
    """Fill the cache with what the first ``samples`` samples need, and what every training does.

    The training then loads neither text nor vision encoders.
    """
    if config.cache is None:
        raise ValueError("there is no cache to fill: name a folder for it in the config")
    examples = Examples(config, Accelerator().device)
    examples.fill_always()
    batches = examples.batches(0)
    for _ in tqdm(range(-(-samples // config.batch_size)), desc="cache"):
        next(batches)


class Trainer:
    """One training.

    Every random choice of a step follows from the seed, the step and the process, so that a state to go on from is
    weights, the optimiser's state, and where in the samples it is.

    Args:
        config: what it is told.
        accelerator: where it runs.
        transformer: FLUX.
        adapter: to be trained.
        examples: to learn from.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        transformer: FluxTransformer2DModel,
        adapter: CharacterAdapter,
        examples: Examples,
    ) -> None:
        self._config, self._accelerator, self._examples = config, accelerator, examples
        if config.ema and accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError("ema needs every process to have all of the adapter: leave it out with FSDP")
        if config.cuda_graph and accelerator.num_processes > 1:
            raise ValueError("cuda_graph records what one process does: leave it out with several")
        _keep_what_blocks_are_given(accelerator)
        flow = CharacterFlow(transformer, adapter, config.checkpointing)
        self._sizes, self._names = adapter.config, _names_in_adapter(flow, adapter)
        self._flow, self._optimizer = accelerator.prepare(flow, _optimizer(_learned(flow), config))
        self._module = accelerator.unwrap_model(self._flow)
        self._learned = _learned(self._module)
        side = config.resolution // VAE_SCALE
        self._places = positions(torch.empty(1, 1, side, side, device=accelerator.device))
        self._step, self._position = 0, 0
        self._losses = torch.zeros(LEVELS, 2, device=accelerator.device)
        self._average: list[Tensor] = []
        self._to_record = config.cuda_graph and accelerator.device.type == "cuda"
        self._load()

    def run(self) -> Path:
        """Take all steps that are left, and write the adapter."""
        config, accelerator = self._config, self._accelerator
        accelerator.init_trackers("tensorboard")
        bar = tqdm(total=config.steps, initial=self._step, desc="train", disable=not accelerator.is_main_process)
        with stop_requests(accelerator.num_processes) as stop_requested, bar:
            batches = self._examples.batches(self._position)
            while self._step < config.steps:
                self._take_step(batches)
                stop = stop_requested()
                bar.update()
                if self._step % config.log_every == 0:
                    bar.set_postfix(loss=f"{self._log():.4f}")
                if self._step % config.preview_every == 0:
                    self._preview()
                if self._step % config.save_every == 0 or stop or self._step == config.steps:
                    self._save()
                if stop:
                    raise KeyboardInterrupt
        for tracker in accelerator.trackers:
            tracker.finish()
        return config.output / ADAPTER

    def _take_step(self, batches: Iterator[tuple[Batch, int]]) -> None:
        config = self._config
        self._flow.train()
        for group in self._optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (self._step + 1) / max(1, config.warmup))
        for part in range(config.accumulate):
            batch, self._position = next(batches)
            self._accelerator.backward(self._loss(batch, part) / config.accumulate)
        self._accelerator.clip_grad_norm_(self._learned, config.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._step += 1
        self._follow()

    def _loss(self, batch: Batch, part: int) -> Tensor:
        device, latents = self._accelerator.device, batch.latents
        generator = torch.Generator(device).manual_seed(self._seed(part))
        sigmas = draw_sigmas(len(latents), latents.shape[1], generator)
        noise = torch.randn(latents.shape, generator=generator, device=device, dtype=torch.float32)
        batch = self._dropped(batch, generator)
        guidance = torch.full_like(sigmas, self._config.guidance)
        told = guidance, batch.prompts, batch.pooled, batch.features, self._places
        velocity = self._velocity(add_noise(latents, noise, sigmas), sigmas, *told)
        losses = velocity_losses(velocity, latents, noise)
        self._count(sigmas, losses.detach())
        return losses.mean()

    def _velocity(self, *given: Any) -> Tensor:
        """The flow's; its passes are recorded at the first, if they are to be replayed."""
        if self._to_record:
            samples = tree_map(torch.clone, given)
            torch.cuda.make_graphed_callables(self._flow, samples, allow_unused_input=True)
            self._to_record = False
        with self._accelerator.autocast():
            return self._flow(*given)

    def _seed(self, part: int) -> int:
        """Another one for every pass of every step in every process."""
        process = self._accelerator.process_index
        return random.Random(f"{self._config.seed} {self._step} {part} {process}").getrandbits(64)

    def _dropped(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Some of it without a text, some without a character."""
        device = batch.latents.device
        textless, nobody = torch.rand(2, len(batch.latents), generator=generator, device=device)
        textless, nobody = textless < self._config.drop_text, nobody < self._config.drop_character
        prompts, pooled, features = batch.prompts, batch.pooled, batch.features
        if self._config.drop_text:
            nothing = self._examples.without_text
            prompts = torch.where(textless[:, None, None], nothing["prompt"], prompts)
            pooled = torch.where(textless[:, None], nothing["pooled"], pooled)
        if self._config.drop_character:
            white = in_order(self._examples.without_character)
            features = tuple(torch.where(nobody[:, None, None], w, f) for w, f in zip(white, features))  # type: ignore[assignment]
        return Batch(batch.latents, prompts, pooled, features)

    def _count(self, sigmas: Tensor, losses: Tensor) -> None:
        level = (sigmas * LEVELS).long().clamp(max=LEVELS - 1)
        self._losses[:, 0].index_add_(0, level, losses.float())
        self._losses[:, 1].index_add_(0, level, torch.ones_like(losses, dtype=torch.float32))

    def _log(self) -> float:
        """Write the losses since the last time; returns their mean."""
        losses = self._accelerator.reduce(self._losses, "sum").tolist()
        self._losses.zero_()
        mean = sum(loss for loss, _ in losses) / sum(count for _, count in losses)
        by_level = {f"loss at σ {i / LEVELS:.1f}": loss / count for i, (loss, count) in enumerate(losses) if count}
        bad = {"bad samples": len(self._examples.tally.bad)}
        self._accelerator.log({"loss": mean, **by_level, **bad}, self._step)
        return mean

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average towards the weights; early on, faster, so that it forgets how they began."""
        if not self._config.ema:
            return
        if not self._average:
            self._average = [parameter.detach().clone() for parameter in self._learned]
        decay = min(self._config.ema, (1 + self._step) / (10 + self._step))
        torch._foreach_lerp_(self._average, [p.detach() for p in self._learned], 1 - decay)

    @torch.no_grad()
    def _preview(self) -> None:
        """Draw the previews into TensorBoard; every process takes part, for a model that is in pieces."""
        for i, preview in enumerate(self._config.previews):
            text, features = self._examples.told(preview)
            tokens = self._draw(text, features)
            if self._accelerator.is_main_process:
                picture = self._decode(tokens)
                tracker = self._accelerator.get_tracker("tensorboard", unwrap=True)
                tracker.add_image(f"{i} {preview.prompt}", picture, self._step)

    def _draw(self, text: dict[str, Tensor], features: dict[str, Tensor]) -> Tensor:
        """Image tokens, with the same noise every time."""
        config, device = self._config, self._accelerator.device
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(config.model, subfolder="scheduler")
        width = self._module.transformer.config.in_channels
        generator = torch.Generator(device).manual_seed(config.seed)
        noise = torch.randn(1, len(self._places), width, generator=generator, device=device)
        one = {key: tensor[None] for key, tensor in {**text, **features}.items()}
        told = one["prompt"], one["pooled"], in_order(one)
        self._flow.eval()
        with self._accelerator.autocast():
            return draw(self._flow, scheduler, noise, *told, places=self._places, steps=config.preview_steps)

    def _decode(self, tokens: Tensor) -> Tensor:
        """A picture, [3, H, W] from 0 to 1."""
        vae, side = self._examples.vae, self._config.resolution
        latents = FluxPipeline._unpack_latents(tokens, side, side, VAE_SCALE)
        pixels = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1).cpu()

    def _save(self) -> None:
        """Write the state and the adapter, each whole or not at all."""
        positions = self._accelerator.gather(torch.tensor([self._position], device=self._accelerator.device))
        weights, moments = get_state_dict(self._module, self._optimizer.optimizer, options=WHOLE)
        if self._accelerator.is_main_process:
            state = {
                "step": self._step,
                "positions": positions.tolist(),
                "weights": weights,
                "optimizer": moments,
                "average": self._average,
                "losses": self._losses,
            }
            with atomic_write(self._config.output / STATE) as partial:
                torch.save(state, partial)
            self._write_adapter({**weights, **dict(zip(self._names, self._average))})
        self._accelerator.wait_for_everyone()

    def _write_adapter(self, weights: dict[str, Any]) -> None:
        with torch.device("meta"):
            adapter = CharacterAdapter(self._sizes)
        adapter.load_state_dict({self._names[name]: weight for name, weight in weights.items()}, assign=True)
        adapter.save(self._config.output / ADAPTER)

    def _load(self) -> None:
        """Go on where a training in this folder was left."""
        path = self._config.output / STATE
        if not path.is_file():
            return
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        weights, moments = state["weights"], state["optimizer"]
        mine = {name: parameter.shape for name, parameter in zip(self._names, self._learned)}
        if {name: weight.shape for name, weight in weights.items()} != mine:
            raise ValueError(f"{path} is of an adapter of other sizes: remove it, or name another output")
        set_state_dict(
            self._module,
            self._optimizer.optimizer,
            model_state_dict=weights,
            optim_state_dict=moments,
            options=replace(WHOLE, strict=False),  # FLUX is not in it
        )
        self._average = [saved.to(p.device) for saved, p in zip(state["average"], self._learned)]
        self._losses.copy_(state["losses"])
        self._step, places = state["step"], state["positions"]
        same = len(places) == self._accelerator.num_processes
        self._position = places[self._accelerator.process_index] if same else max(places)


def _keep_what_blocks_are_given(accelerator: Accelerator) -> None:
    """Have FSDP leave the blocks' inputs in their own dtypes.

    Places in bfloat16 are not where they were, and what FSDP casts in the forward pass it does not cast when a block is
    computed again for its gradients: torch then stops (2.11).
    """
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
    if plugin and plugin.mixed_precision_policy:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, cast_forward_inputs=False)


def _names_in_adapter(flow: CharacterFlow, adapter: CharacterAdapter) -> dict[str, str]:
    """A learned weight's name in the flow → its name in the adapter, in the order of the flow's parameters."""
    names = {parameter: name for name, parameter in adapter.named_parameters()}
    return {name: names[parameter] for name, parameter in flow.named_parameters() if parameter in names}


def _new(config: TrainingConfig) -> CharacterAdapter:
    torch.manual_seed(config.seed)
    return new_adapter(CharacterAdapter(config.sizes))


def _learned(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _optimizer(parameters: list[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError("optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes") from error
    return AdamW8bit(parameters, **settings)
