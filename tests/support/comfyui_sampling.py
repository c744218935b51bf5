"""ComfyUI's own sampling of the recorded FLUX."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import torch
from support import recorded

ROWS, COLUMNS = 4, 6
SIGMAS = torch.tensor([1.0, 0.8125, 0.5625, 0.25, 0.0])


def to_latents(tokens: torch.Tensor) -> torch.Tensor:
    """[B, rows · columns, 64] tokens as [B, 16, h, w] latents."""
    return tokens.view(-1, ROWS, COLUMNS, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(-1, 16, 2 * ROWS, 2 * COLUMNS)


def to_tokens(latents: torch.Tensor) -> torch.Tensor:
    return latents.view(-1, 16, ROWS, 2, COLUMNS, 2).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def conditioning(which: str = "prompt") -> list:
    prefix = {"prompt": "", "negative": "negative_"}[which]
    text = recorded.prompt() if which == "prompt" else recorded.negative_prompt()
    pooled = text[f"{prefix}pooled_prompt_embeds"]
    return [[text[f"{prefix}prompt_embeds"], {"pooled_output": pooled, "guidance": 3.5}]]


def sample(model, sampler="euler", sigmas=SIGMAS, cfg=1.0, batch=1, **settings) -> torch.Tensor:
    """ComfyUI's own sampling, from noise of 0.5: latents [B, 16, 8, 12]."""
    noise = to_latents(recorded.run_settings()["latents"]).expand(batch, -1, -1, -1)
    empty = torch.zeros_like(noise)
    settings = {"seed": 0, "disable_pbar": True, **settings}
    chosen = comfy.samplers.sampler_object(sampler)
    positive, negative = conditioning(), conditioning("negative")
    sigmas = sigmas.clone()  # uni_pc changes them
    try:
        return comfy.sample.sample_custom(model, noise, cfg, chosen, sigmas, positive, negative, empty, **settings)
    except BaseException:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # ComfyUI's copies may be under way when a sampling fails, and its memory goes
        raise
