"""How fast a picture with a character is: in bf16 or fp8 arithmetic, compiled, with steps left out, in batches.

    python -m benchmarks.speed            # 1024×1024, 28 steps, about 5 minutes on an H100
    python -m benchmarks.speed --tiny     # a tiny size on a CPU, without compiling

Random weights of the real sizes: times do not depend on their values. Plain FLUX and FLUX with a character are timed in
turn, everything on the GPU; a picture is 28 steps and decoding, its prompt encoded before. Errors are of one step's
output against bf16 that is not compiled. Which steps a cache leaves out depends on the weights; here it leaves out as
many as it does in the toy world, see ``RESULTS.md``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL

from benchmarks.common import (
    DTYPE,
    Device,
    build,
    print_versions,
    random_adapter,
    random_flux,
    require_cuda,
    step_inputs,
    tokens_at,
    with_subject,
)
from instantcharacter import Character, CharacterAdapter, InstantCharacterPipeline
from instantcharacter.flux import first_block_cache
from instantcharacter.flux.fp8 import compute_in_fp8
from instantcharacter.flux.load import VAE
from instantcharacter.flux.scheduler import flux_scheduler

KINDS = ("plain", "character")
STEPS = 28
LEFT_OUT_AT_ONCE = 2
"""Steps that the cache leaves out one after another here: 18 of 28, where it leaves out about 17 in the toy world."""


@dataclass
class Row:
    """A way to compute; times in seconds, of plain FLUX and of FLUX with a character, in the order of ``KINDS``."""

    name: str
    steps: tuple[float, ...]
    pictures: tuple[float, ...]
    error: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny size, on the CPU")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each kind (15)")
    parser.add_argument("--pictures", type=int, default=2, help="timed pictures of each kind (2)")
    options = parser.parse_args()
    require_cuda("speed", options.tiny)
    device = Device(options.tiny)
    print_versions(device)
    rows: list[Row] = []
    exact = None
    with torch.no_grad():
        for weights in ("bf16", "fp8"):
            bench = Bench(device, options.repeats, options.pictures)
            if weights == "fp8":
                bench.compute_in_fp8()
            for compiled in (False,) if options.tiny else (False, True):
                if compiled:
                    bench.pipeline.enable_character_compile()
                output = bench.output()
                exact = output if exact is None else exact
                error = ((output - exact).norm() / exact.norm()).item()
                rows.append(Row(weights + ", compiled" * compiled, bench.steps(), bench.pictures(), error))
                print_row(rows[-1], rows[0])
        bench.print_cache(rows[0].pictures[0])
        bench.print_batches()


def print_row(row: Row, base: Row) -> None:
    steps = ", ".join(
        f"{kind} {seconds * 1000:7.1f} ms {seconds / base.steps[0]:.3f}" for kind, seconds in zip(KINDS, row.steps)
    )
    pictures = ", ".join(
        f"{kind} {seconds:6.2f} s {seconds / base.pictures[0]:.3f}" for kind, seconds in zip(KINDS, row.pictures)
    )
    print(
        f"{row.name:16s} step: {steps}, {row.steps[1] / row.steps[0]:.3f} of its own plain; picture: {pictures}; "
        f"{row.error:.1e} off",
        flush=True,
    )


class Bench:
    """A pipeline of random weights, the same for each instance, and what is timed of it."""

    def __init__(self, device: Device, repeats: int, pictures: int) -> None:
        torch.manual_seed(0)
        self.device = device
        self._repeats, self._pictures = repeats, pictures
        self._transformer, adapter = random_flux(device), random_adapter(device)
        self._call = step_inputs(device, self._transformer, 1)
        fused = torch.randn(1, 20 if device.tiny else 1458, adapter.config.feature_dim, device=device.name, dtype=DTYPE)
        self._tokens = tokens_at(device, adapter, fused, folded=True)
        self._character = Character(fused, adapter.fingerprint())
        self.pipeline = self._make_pipeline(adapter)

    def _make_pipeline(self, adapter: CharacterAdapter) -> InstantCharacterPipeline:
        small = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4} if self.device.tiny else {}
        settings = {key: value for key, value in {**VAE, **small}.items() if not key.startswith("_")}
        vae = build(AutoencoderKL, self.device, **settings)
        pipeline = InstantCharacterPipeline(flux_scheduler(), vae, None, None, None, None, self._transformer)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.set_character_adapter(adapter, self.device.name)
        return pipeline

    def compute_in_fp8(self) -> None:
        """As the pipeline's method does it, which refuses a CPU."""
        if self.device.tiny:
            compute_in_fp8(self._transformer, DTYPE, by_rows=True)
        else:
            self.pipeline.enable_character_fp8()

    def output(self) -> torch.Tensor:
        """One step's output with a character."""
        joint = with_subject(self._tokens, self._call)
        return self._transformer(**self._call, joint_attention_kwargs=joint)[0].float()

    def steps(self) -> tuple[float, ...]:
        """The median seconds of a step of each kind, in turn."""
        with_character = with_subject(self._tokens, self._call)

        def step(joint: dict[str, object] | None) -> Callable[[], object]:
            return lambda: self._transformer(**self._call, joint_attention_kwargs=joint)

        return self._in_turn([step(None), step(with_character)], self._repeats)

    def pictures(self) -> tuple[float, ...]:
        """The median seconds of a picture of each kind, in turn."""
        return self._in_turn([lambda: self.picture(None), lambda: self.picture(self._character)], self._pictures)

    def picture(self, character: Character | None, count: int = 1, **settings: Any) -> None:
        """A picture, or several at once."""
        text, pooled = self._call["encoder_hidden_states"], self._call["pooled_projections"]
        side = {"height": 64, "width": 64, "max_sequence_length": 16} if self.device.tiny else {}
        self.pipeline(
            prompt_embeds=text,
            pooled_prompt_embeds=pooled,
            num_images_per_prompt=count,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(0),
            subject_image=character,
            output_type="pt",
            **side,
            **settings,
        )

    def print_cache(self, plain: float) -> None:
        """A picture with steps left out, against the first plain one."""
        calls: list[object] = []
        handle = self._transformer.single_transformer_blocks[0].register_forward_hook(lambda *_: calls.append(1))
        cached = partial(self.picture, self._character, cache_threshold=float("inf"))
        with leaving_out(LEFT_OUT_AT_ONCE):
            seconds = self._in_turn([cached], self._pictures)
            calls.clear()
            cached()
        handle.remove()
        print(
            f"the last, with {STEPS - len(calls)} of {STEPS} steps left out: character {seconds[0]:6.2f} s "
            f"{seconds[0] / plain:.3f}"
        )

    def print_batches(self) -> None:
        """Four pictures at once against four one after another."""

        def singles() -> None:
            for _ in range(4):
                self.picture(self._character)

        one_by_one, at_once = self._in_turn([singles, lambda: self.picture(self._character, 4)], 1)
        print(f"four pictures: one by one {one_by_one:.2f} s, at once {at_once:.2f} s, {at_once / one_by_one:.3f}")

    def _in_turn(self, calls: list[Callable[[], object]], repeats: int) -> tuple[float, ...]:
        """The median seconds of each call, after a first one that is not counted."""
        times: list[list[float]] = [[] for _ in calls]
        for repeat in range(repeats + 1):
            for call, seconds in zip(calls, times):
                begin = time.perf_counter()
                call()
                if not self.device.tiny:
                    torch.cuda.synchronize()
                if repeat:
                    seconds.append(time.perf_counter() - begin)
        return tuple(statistics.median(seconds) for seconds in times)


@contextmanager
def leaving_out(at_once: int) -> Iterator[None]:
    """Context manager in which the cache leaves out at most this many steps one after another."""
    before, first_block_cache.MAX_LEFT_OUT = first_block_cache.MAX_LEFT_OUT, at_once
    try:
        yield
    finally:
        first_block_cache.MAX_LEFT_OUT = before


if __name__ == "__main__":
    main()
