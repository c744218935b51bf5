"""The training loop."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from diffusers import FluxTransformer2DModel
from torch import Tensor
from tqdm import tqdm

from ..flux.latents import img_ids
from ..model.adapter import CharacterAdapter
from .checkpoint import Checkpoint, Progress, names_in_adapter
from .config import TrainingConfig
from .data.examples import Batch, Examples, features_in_order
from .flow import CharacterFlow
from .losses import LossesByLevel, mean_losses
from .objective import add_noise, sample_sigmas, velocity_losses
from .optimizer import MovingAverage, new_optimizer, warm_up
from .previews import Previews
from .stopping import stop_requests

OnStep = Callable[[int, Tensor], None]
"""Called after each optimizer step with its number, from 1 on, and this process's mean loss in it."""


class Trainer:
    """One training; resumes from the state in its folder.

    Every random choice of a step follows from the seed, the step and the process, so that the state to resume from is
    weights, optimizer state, and the position among the samples.

    Args:
        config: the training's settings.
        accelerator: where it runs.
        transformer: FLUX.
        adapter: the adapter to train.
        examples: batches of samples.
        on_step: called after each step; an exception from it ends the training before anything is written.

    Raises:
        ValueError: settings that exclude each other, or a state of an adapter of other sizes.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        transformer: FluxTransformer2DModel,
        adapter: CharacterAdapter,
        examples: Examples,
        on_step: OnStep | None = None,
    ) -> None:
        self._config, self._accelerator, self._examples, self._on_step = config, accelerator, examples, on_step
        if config.ema and accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError("ema needs every process to have all of the adapter: leave it out with FSDP")
        if config.cuda_graph and accelerator.num_processes > 1:
            raise ValueError("cuda_graph records what one process does: leave it out with several")
        disable_fsdp_input_casting(accelerator)
        flow = CharacterFlow(transformer, adapter, config.checkpointing)
        self._checkpoint = Checkpoint(
            config.output, config.keep_states, adapter.config, names_in_adapter(flow, adapter)
        )
        optimizer = new_optimizer([p for p in flow.parameters() if p.requires_grad], config)
        self._flow, self._optimizer = accelerator.prepare(flow, optimizer)
        self._module = accelerator.unwrap_model(self._flow)
        self._trained = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        self._average = MovingAverage(self._trained, config.ema)
        self._losses = LossesByLevel(accelerator.device)
        self._previews = Previews(config, accelerator, examples, transformer.config.in_channels)
        self._img_ids = img_ids(config.resolution // 16, config.resolution // 16, accelerator.device)
        self._capture = config.cuda_graph and accelerator.device.type == "cuda"
        self._progress = self._load()
        self._warm_up = warm_up(self._optimizer.optimizer, config, self._progress.step)

    def run(self) -> Path:
        """Take the remaining steps; returns the adapter's file.

        Raises:
            KeyboardInterrupt: it was interrupted; the state is saved.
            ValueError: a loss or a weight is not finite; the last good states stay.
        """
        config, accelerator, progress = self._config, self._accelerator, self._progress
        accelerator.init_trackers("tensorboard")
        bar = tqdm(total=config.steps, initial=progress.step, desc="train", disable=not accelerator.is_main_process)
        with stop_requests(accelerator.num_processes) as stop_requested, bar:
            batches = self._examples.batches(progress.position)
            while progress.step < config.steps:
                loss = self._take_step(batches)
                if self._on_step:
                    self._on_step(progress.step, loss)
                stop = stop_requested()
                bar.update()
                if progress.step % config.log_every == 0:
                    bar.set_postfix(loss=f"{self._log():.4f}")
                if progress.step % config.preview_every == 0:
                    self._previews.write(self._flow, progress.step)
                if progress.step % config.save_every == 0 or stop or progress.step == config.steps:
                    self._save()
                if stop:
                    raise KeyboardInterrupt
        if not self._in_all_processes(self._checkpoint.is_complete):
            self._save()
        for tracker in accelerator.trackers:
            tracker.finish()
        return self._checkpoint.adapter

    def _take_step(self, batches: Iterator[tuple[Batch, int]]) -> Tensor:
        """One optimizer step; returns its mean loss."""
        passes = []
        self._flow.train()
        for number in range(self._config.accumulate):
            batch, self._progress.position = next(batches)
            loss = self._loss(batch, number)
            self._accelerator.backward(loss / self._config.accumulate)
            passes.append(loss.detach())
        self._accelerator.clip_grad_norm_(self._trained, self._config.clip)
        self._optimizer.step()
        self._warm_up.step()
        self._optimizer.zero_grad()
        self._progress.step += 1
        self._average.update(self._progress.step)
        return torch.stack(passes).mean()

    def _loss(self, batch: Batch, number: int) -> Tensor:
        """The mean loss of pass ``number`` of a step."""
        device, latents = self._accelerator.device, batch.latents
        generator = torch.Generator(device).manual_seed(self._seed(number))
        sigmas = sample_sigmas(len(latents), latents.shape[1], generator)
        noise = torch.randn(latents.shape, generator=generator, device=device, dtype=torch.float32)
        batch = self._drop_conditions(batch, generator)
        guidance = torch.full_like(sigmas, self._config.guidance)
        conditioning = guidance, batch.prompts, batch.pooled, batch.features, self._img_ids
        velocity = self._predict(add_noise(latents, noise, sigmas), sigmas, *conditioning)
        losses = velocity_losses(velocity, latents, noise)
        self._losses.add(sigmas, losses.detach())
        return losses.mean()

    def _predict(self, *inputs: Any) -> Tensor:
        """The flow's velocity; with ``cuda_graph`` the first call captures its passes, and later ones replay them."""
        if self._capture:
            torch.cuda.make_graphed_callables(self._flow, _clone(inputs), allow_unused_input=True)
            self._capture = False
        with self._accelerator.autocast():
            return self._flow(*inputs)

    def _seed(self, number: int) -> int:
        """A seed for each pass of each step in each process."""
        process = self._accelerator.process_index
        return random.Random(f"{self._config.seed} {self._progress.step} {number} {process}").getrandbits(64)

    def _drop_conditions(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with random captions replaced by the empty prompt, and random references by the white picture."""
        dropped = torch.rand(2, len(batch.latents), generator=generator, device=batch.latents.device)
        no_text, no_character = dropped[0] < self._config.drop_text, dropped[1] < self._config.drop_character
        prompts, pooled, features = batch.prompts, batch.pooled, batch.features
        if self._config.drop_text:
            empty = self._examples.without_text
            prompts = torch.where(no_text[:, None, None], empty["prompt"], prompts)
            pooled = torch.where(no_text[:, None], empty["pooled"], pooled)
        if self._config.drop_character:
            white = features_in_order(self._examples.without_character)
            features = tuple(torch.where(no_character[:, None, None], w, f) for w, f in zip(white, features))  # type: ignore[assignment]
        return Batch(batch.latents, prompts, pooled, features)

    def _log(self) -> float:
        """Log the mean losses since the last call; returns the mean of all."""
        self._check_finite()
        means = mean_losses(self._accelerator.reduce(self._losses.sums, "sum"))
        self._losses.sums.zero_()
        self._accelerator.log({**means, "bad samples": len(self._examples.tally.bad)}, self._progress.step)
        return means["loss"]

    def _check_finite(self) -> None:
        """Raise ``ValueError`` in every process unless all losses since the last log, and all weights, are finite."""
        local = [getattr(weight, "to_local", lambda weight=weight: weight)() for weight in self._trained]  # FSDP's part
        finite = torch.stack([tensor.isfinite().all() for tensor in (self._losses.sums, *local)]).all()
        if not self._in_all_processes(bool(finite)):
            raise ValueError(
                f"a loss or a weight is not finite at step {self._progress.step}: the training diverged. The states in "
                f"{self._config.output} are of earlier steps, all finite. Lower learning_rate "
                f"({self._config.learning_rate:g}) or clip ({self._config.clip:g}), and run the same command again."
            )

    def _in_all_processes(self, condition: bool) -> bool:
        gathered: Tensor = self._accelerator.gather(torch.tensor([condition], device=self._accelerator.device))
        return bool(gathered.all())

    def _save(self) -> None:
        self._check_finite()
        progress = replace(self._progress, average=self._average.values, losses=self._losses.sums)
        self._checkpoint.save(self._accelerator, self._module, self._optimizer.optimizer, progress)

    def _load(self) -> Progress:
        progress = self._checkpoint.load(self._accelerator, self._module, self._optimizer.optimizer)
        self._average.load(progress.average)
        self._losses.sums.copy_(progress.losses)
        return progress


def disable_fsdp_input_casting(accelerator: Accelerator) -> None:
    """Have FSDP leave the inputs of FLUX's blocks in their own dtypes.

    Positions in bfloat16 would be rounded, and FSDP does not repeat its casting of the forward pass when a block is
    recomputed for its gradients: torch then stops (2.11).
    """
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
    if plugin and plugin.mixed_precision_policy:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, cast_forward_inputs=False)


def _clone(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_clone(value) if isinstance(value, tuple) else value.clone() for value in inputs)
