from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from support import recorded, tiny

from instantcharacter import Character, InstantCharacterPipeline
from instantcharacter.batch.jobs import Job, read_jobs


class FakePipeline:
    """Pictures of 8×8 pixels that show their prompt's length and their noise; counts what it is asked for.

    Attributes:
        encoded: the prompts, as they come.
        batches: how many pictures were generated at once, as they come.
        on_call: called with the number of the batch, from 0, before it is generated.
    """

    offloader = transformer = None
    device = torch.device("cpu")
    image_processor = VaeImageProcessor()

    def __init__(self) -> None:
        self.encoded: list[str] = []
        self.created = 0
        self.batches: list[int] = []
        self.on_call: Callable[[int], None] = lambda number: None

    def models_changing(self) -> Any:
        return nullcontext()

    def create_character(self, picture: Image.Image, fit: str = "pad") -> Character:
        self.created += 1
        return Character(torch.zeros(1, 2, 4), "0" * 32)

    def encode_prompt(self, text: str, text_2: None) -> tuple[torch.Tensor, torch.Tensor, None]:
        self.encoded.append(text)
        return torch.full((1, 2, 4), float(len(text))), torch.zeros(1, 4), None

    def __call__(self, prompt_embeds: torch.Tensor, generator: list[torch.Generator], **_: Any) -> Any:
        self.on_call(len(self.batches))
        self.batches.append(len(generator))
        noise = np.stack([torch.rand(8, 8, 3, generator=each).numpy() for each in generator])
        return SimpleNamespace(images=(noise + prompt_embeds.mean((1, 2)).numpy()[:, None, None, None] / 99) / 3)


@pytest.fixture
def pipeline(adapter) -> InstantCharacterPipeline:
    """The recorded FLUX with small text encoders, the recorded adapter set."""
    components = {**tiny.tiny_components(), "transformer": recorded.transformer()}
    pipeline = InstantCharacterPipeline(**components)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.set_character_adapter(adapter)
    return pipeline


@pytest.fixture
def fake() -> FakePipeline:
    return FakePipeline()


@pytest.fixture
def jobs_file(tmp_path) -> Callable[..., Path]:
    """Writes a job's file with a line for each row; one that has no character gets the recorded picture."""

    def write(*rows: object, name: str = "jobs.jsonl") -> Path:
        lines = []
        for row in rows:
            if isinstance(row, dict) and not row.keys() & {"reference", "character"}:
                row = {"reference": str(recorded.PICTURE), **row}
            lines.append(row if isinstance(row, str) else json.dumps(row))
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return tmp_path / name

    return write


@pytest.fixture
def jobs_of(jobs_file) -> Callable[..., list[Job]]:
    """The jobs of rows, none of them bad."""

    def read(*rows: object, **defaults: object) -> list[Job]:
        jobs, bad = read_jobs(jobs_file(*rows), defaults)
        assert bad == []
        return jobs

    return read
