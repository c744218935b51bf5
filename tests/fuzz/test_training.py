"""Trainings: configuration files, metadata files of image folders, and the pictures that they name."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from instantcharacter.training import Source, TrainingConfig, read_config
from instantcharacter.training.data.image_folder import METADATA
from instantcharacter.training.data.pictures import reference_crops, target_pixels
from instantcharacter.training.data.samples import BadSample, Sample, Samples

SETTINGS = [field.name for field in fields(TrainingConfig)]
GOOD: dict[str, Any] = {"output": "out", "data": [{"path": "pictures", "pairs": True}]}
odd_numbers = st.sampled_from([0, 1, -1, 2, 16, 10**30, 2**64, 0.5, math.nan, math.inf, -math.inf, 1e308, 5e-324])
odd_texts = st.sampled_from(
    ["", " ", "1e-4", "nan", ".inf", "adamw", "float32", "a/b", "x" * 300, "\N{FOX FACE}", "0x10", "null"]
)
scalars = odd_numbers | odd_texts | st.booleans() | st.none() | st.integers() | st.floats() | st.text(max_size=4)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_texts, inner, max_size=3), max_leaves=6
)
sources = st.fixed_dictionaries(
    {}, optional={"path": values, "pairs": values, "share": values, "stream": values, "gone": values}
)
settings = st.dictionaries(st.sampled_from([*SETTINGS, "gone", ""]), values, max_size=3)
configs = st.builds(
    lambda more, data: {**GOOD, **({"data": data} if data else {}), **more}, settings, st.lists(sources, max_size=2)
)
mutations = st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=4)), max_size=4)


def mutated(data: bytes, changes: list[tuple[int, bytes]]) -> bytes:
    """The bytes with some of them replaced, or cut off where the replacement is empty."""
    for at, new in changes:
        at %= len(data) + 1
        data = data[:at] + new + data[at + len(new) :] if new else data[:at]
    return data


def is_sound(config: TrainingConfig) -> bool:
    """Whether a training could begin: all numbers finite where they must be, and positive counts."""
    numbers = [value for value in vars(config).values() if isinstance(value, int | float)]
    counts = (
        config.steps,
        config.batch_size,
        config.accumulate,
        config.keep_states,
        config.save_every,
        config.preview_steps,
    )
    return (
        not any(math.isnan(number) for number in numbers)
        and all(type(count) is int and count >= 1 for count in counts)
        and math.isfinite(config.learning_rate)
        and config.resolution % 16 == 0
        and 0 < sum(source.share for source in config.data) < math.inf
    )


@given(config=configs | values)
def test_config_of_odd_values(outcomes, tmp_path, config):
    path = tmp_path / "stage.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    outcomes.judge(lambda: read_config(path), is_sound)


@given(changes=mutations, encoding=st.sampled_from(["utf-8", "utf-16", "utf-8-sig", "latin-1", "utf-32"]))
def test_config_of_other_bytes(outcomes, tmp_path, changes, encoding):
    path = tmp_path / "stage.yaml"
    text = yaml.safe_dump({**GOOD, "steps": 3, "learning_rate": 1e-4, "output": "föx"}, allow_unicode=True)
    path.write_bytes(mutated(text.encode(encoding), changes))
    outcomes.judge(lambda: read_config(path), is_sound)


@given(text=st.text(st.sampled_from("&*!<>%@`[]{}:,-?|#'\" \nab01.~"), max_size=30))
def test_config_of_yamls_own_signs(outcomes, tmp_path, text):
    path = tmp_path / "stage.yaml"
    path.write_text(f"output: out\ndata: [{{path: pictures}}]\n{text}")
    outcomes.judge(lambda: read_config(path), is_sound)


lines = st.fixed_dictionaries(
    {}, optional={"file_name": values | st.just("a.png"), "text": values | st.just("a fox"), "reference": values}
)
rows = st.lists(
    lines.map(lambda line: json.dumps(line)) | st.text(max_size=8) | st.just('{"file_name": "a.png", "text": "a"}'),
    max_size=4,
)


@given(
    rows=rows,
    changes=mutations,
    encoding=st.sampled_from(["utf-8", "utf-16", "utf-8-sig", "utf-16-le", "utf-32", "latin-1"]),
    pairs=st.booleans(),
)
def test_metadata(outcomes, tmp_path, rows, changes, encoding, pairs):
    """Each row becomes a whole sample, or says why it is none."""
    (tmp_path / "a.png").touch()
    (tmp_path / METADATA).write_bytes(mutated("\n".join(rows).encode(encoding, "replace"), changes))

    def take() -> list[Sample | BadSample]:
        samples = Samples((Source(str(tmp_path), pairs),), 0).from_position(0)
        return [next(samples) for _ in range(8)]

    def is_right(samples: list[Sample | BadSample]) -> bool:
        return all(
            str(s) if isinstance(s, BadSample) else s.text.strip() and isinstance(s.picture, Path) for s in samples
        )

    outcomes.judge(take, is_right)


def encoded(kind: str, mode: str) -> bytes:
    Image.effect_noise((40, 30), 90).convert(mode).save(file := BytesIO(), kind)
    return file.getvalue()


PICTURES = [
    encoded(*names)
    for names in (("PNG", "RGB"), ("JPEG", "L"), ("WEBP", "RGB"), ("PNG", "P"), ("GIF", "P"), ("TIFF", "F"))
]


@pytest.mark.parametrize(
    "prepare", [lambda data: target_pixels(data, 64), reference_crops], ids=["target", "reference"]
)
@given(data=st.builds(mutated, st.sampled_from(PICTURES), mutations) | st.binary(max_size=40))
def test_picture(outcomes, prepare, data):
    def is_right(pixels: torch.Tensor) -> bool:
        return bool(pixels.isfinite().all()) and 3 in (pixels.shape[-1], pixels.shape[-3])

    outcomes.judge(lambda: prepare(data), is_right)
