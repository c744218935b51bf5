"""Hostile settings of the three pipelines, of memory plans, and of characters and strengths.

Every call has one to three hostile settings among good ones. What is accepted must be a picture of the asked kind, size
and number; and after it, refused or not, a good call must generate what it did before, bit for bit.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support import recorded
from support.tiny import byte_tokenizer, tiny_components

from instantcharacter import (
    Character,
    InstantCharacterImg2ImgPipeline,
    InstantCharacterInpaintPipeline,
    InstantCharacterPipeline,
    Strength,
)
from instantcharacter.flux.sweep import cross, parse_values
from instantcharacter.offload import RELEASED, MemoryPlan, plan

NAN, INF = float("nan"), float("inf")
WIDTH, HEIGHT = 32, 16

# Values


NUMBERS = st.one_of(
    st.sampled_from([NAN, INF, -INF, 0, -1, 1, 2, 1.5, 1e30, -1e30, 2**31, 2**63, 10**400, True, np.float32(0.5)]),
    st.floats(-1, 12),
    st.integers(-3, 12),
)
ODD = st.sampled_from(
    [None, "", "0.9", "\ud800", b"x", [], {}, (), object, [None], {"a": 1}, 1j, np.zeros(0), np.ones((2, 2)), [[1]]]
)
ANYTHING = st.one_of(NUMBERS, ODD)
FRACTIONS = st.one_of(st.floats(0, 1), st.floats(0, 1), ANYTHING)
DTYPES = st.sampled_from(
    [torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
)
FILLINGS = st.sampled_from([0.0, 0.5, 1.0, 255.0, -0.7, NAN, INF, 1e30])


@st.composite
def tensors(draw: Any, *shapes: tuple[int, ...]) -> Any:
    """A tensor or array of one of the shapes or of another, of any kind, with values that vary or do not."""
    other = st.lists(st.integers(0, 5), max_size=5).map(tuple)
    shape = draw(st.one_of(st.sampled_from(shapes), other))
    values = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * draw(FILLINGS)
    tensor = values.to(draw(DTYPES))
    kinds = [lambda: tensor, lambda: tensor, lambda: [tensor], lambda: tensor.to("meta"), lambda: tensor.to_sparse()]
    if tensor.dtype != torch.bfloat16:
        kinds += [tensor.numpy, lambda: [tensor.numpy()]]
    return draw(st.sampled_from(kinds))()


@st.composite
def images(draw: Any) -> Image.Image:
    mode = draw(st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F", "I;16", "HSV"]))
    size = draw(st.sampled_from([(WIDTH, HEIGHT), (16, 16), (1, 1), (40, 7), (0, 4)]))
    return Image.new(mode, size, draw(st.sampled_from([0, 1])))


GENERATORS = st.one_of(
    st.integers(0, 3).map(lambda count: [torch.Generator() for _ in range(count)]), st.just(torch.Generator()), ANYTHING
)
TEXTS = st.one_of(
    st.sampled_from(["a fox", "", "\ud800", "x" * 3000, ["a fox"], ["a", "b"], [], [1], ["a", None], ("a", "b"), b"a"]),
    st.text(max_size=5),
    ODD,
)
NO_PATH = ODD.filter(lambda value: not isinstance(value, str))
"""A file that does not exist is the system's ``FileNotFoundError``, which names it."""
PICTURES = st.one_of(
    images(),
    tensors(
        (HEIGHT, WIDTH, 3), (1, 3, HEIGHT, WIDTH), (1, 16, 2, 4), (HEIGHT, WIDTH), (2, 3, 16, 32), (1, HEIGHT, WIDTH)
    ),
    st.lists(images(), max_size=2),
    NO_PATH,
)
SUBJECTS = st.sampled_from(["character", "other", "both", "empty", "nan", "wide", "picture"])
STRENGTHS = st.builds(Strength, *[st.floats(0, 2)] * 5)
ROWS = HEIGHT * WIDTH // 256
COMMON: dict[str, st.SearchStrategy[Any]] = {
    "prompt": TEXTS,
    "prompt_2": TEXTS,
    "negative_prompt": TEXTS,
    "negative_prompt_2": TEXTS,
    "true_cfg_scale": ANYTHING,
    "height": st.one_of(ANYTHING, st.sampled_from([16, 17, 32, 48])),
    "width": st.one_of(ANYTHING, st.sampled_from([16, 40, 64])),
    "num_inference_steps": st.one_of(ODD, st.integers(-2, 3), st.sampled_from([NAN, 1.5, 2**40, 10**400, True, "2"])),
    "sigmas": st.one_of(st.lists(NUMBERS, max_size=3), st.just([1.0, 0.5]), st.just(np.array([1, 0.25])), ANYTHING),
    "guidance_scale": ANYTHING,
    "num_images_per_prompt": ANYTHING.filter(lambda value: not isinstance(value, int) or not 3 < value <= 1024),
    "generator": GENERATORS,
    "latents": tensors((1, ROWS, 64), (2, ROWS, 64), (1, 16, 2, 4), (1, 64, ROWS)),
    "prompt_embeds": tensors((1, 10, 64), (2, 10, 64), (1, 10, 63), (10, 64)),
    "pooled_prompt_embeds": tensors((1, 32), (2, 32), (1, 31), (32,)),
    "negative_prompt_embeds": tensors((1, 10, 64), (2, 10, 64), (1, 7, 64)),
    "negative_pooled_prompt_embeds": tensors((1, 32), (2, 32), (32,)),
    "output_type": st.one_of(st.sampled_from(["pil", "np", "pt", "latent", "jpeg"]), ANYTHING),
    "return_dict": ANYTHING,
    "joint_attention_kwargs": st.one_of(
        st.dictionaries(
            st.sampled_from(
                ["scale", "subjects", "image_tokens", "hidden_states", "other", "ip_hidden_states", "\ud800"]
            ),
            ANYTHING,
            max_size=2,
        ),
        ANYTHING,
    ),
    "callback_on_step_end": st.one_of(
        ODD, st.sampled_from([lambda *_: {}, lambda *_: None, lambda *_: {"latents": 3}, lambda pipe, i, t, got: got])
    ),
    "callback_on_step_end_tensor_inputs": st.one_of(st.just(["prompt_embeds"]), st.just("latents"), ANYTHING),
    "max_sequence_length": st.one_of(st.sampled_from([1, 8, 512, 513]), ANYTHING),
    "ip_adapter_image": ODD,
    "subject_image": st.one_of(SUBJECTS, NO_PATH),
    "subject_scale": st.one_of(ANYTHING, STRENGTHS, st.lists(st.one_of(NUMBERS, STRENGTHS), max_size=3)),
    "subject_mask": st.one_of(PICTURES, st.lists(PICTURES, max_size=2)),
    "subject_fit": st.one_of(st.sampled_from(["pad", "stretch", "crop"]), ANYTHING),
    "subject_start": ANYTHING,
    "subject_end": ANYTHING,
    "cache_threshold": ANYTHING,
    "unknown": ANYTHING,
}
IMG2IMG = COMMON | {"image": PICTURES, "strength": ANYTHING}
INPAINT = IMG2IMG | {
    "mask_image": PICTURES,
    "masked_image_latents": st.one_of(tensors((1, 16, 2, 4), (1, 3, HEIGHT, WIDTH)), ODD),
    "padding_mask_crop": ANYTHING,
}


@st.composite
def hostile(draw: Any, values: dict[str, st.SearchStrategy[Any]]) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=3, unique=True))
    return {name: draw(values[name]) for name in names}


# Pipelines


class World:
    """A pipeline of each kind with text encoders, and its good picture."""

    def __init__(self, kind: type, adapter: Any, fused: torch.Tensor, **settings: Any) -> None:
        texts = {name: part for name, part in tiny_components().items() if "text" in name or "tokenizer" in name}
        self.pipeline = kind(**recorded.components() | texts | {"tokenizer_2": byte_tokenizer(16)})
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.set_character_adapter(adapter)
        self.characters = {
            "character": Character(fused, adapter.fingerprint()),
            "other": Character(fused, "0" * 32),
            "both": [Character(fused, adapter.fingerprint()), Character(fused + 1, adapter.fingerprint())],
            "wide": Character(torch.ones(1, 3, 81), adapter.fingerprint()),
            "nan": Character(fused.clone(), adapter.fingerprint()),
            "empty": [],
            "picture": recorded.PICTURE,
        }
        self.characters["nan"].fused[0, 0] = NAN
        self._settings = settings
        self.expected = self.generate({})[0]

    def generate(self, changes: dict[str, Any]) -> Any:
        """The pictures, and the settings that they are of."""
        settings = {
            "prompt": "a fox",
            "width": WIDTH,
            "height": HEIGHT,
            "num_inference_steps": 1,
            "max_sequence_length": 8,
            "generator": torch.Generator().manual_seed(3),
            "output_type": "pt",
            "subject_image": "character",
            **self._settings,
            **changes,
        }
        if changes.get("prompt_embeds") is not None and "prompt" not in changes:
            settings["prompt"] = None
        subject = settings["subject_image"]
        if isinstance(subject, str):
            settings["subject_image"] = self.characters.get(subject, subject)
        result = self.pipeline(**settings)
        return (result.images if hasattr(result, "images") else result[0]), settings


TEXT_TO_IMAGE, TO_IMAGE, TO_PART = (
    InstantCharacterPipeline,
    InstantCharacterImg2ImgPipeline,
    InstantCharacterInpaintPipeline,
)


@pytest.fixture(scope="module")
def worlds() -> dict[type, World]:
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    adapter = recorded.adapter()
    fused = adapter.projector.fuse(*recorded.features(tokens=9)).detach()
    noise = np.random.default_rng(2).random((HEIGHT, WIDTH, 3), np.float32)
    image = {"image": Image.fromarray((255 * noise).astype(np.uint8)), "strength": 1.0}
    return {
        TEXT_TO_IMAGE: World(TEXT_TO_IMAGE, adapter, fused),
        TO_IMAGE: World(TO_IMAGE, adapter, fused, **image),
        TO_PART: World(TO_PART, adapter, fused, **image, mask_image=Image.new("L", (WIDTH, HEIGHT), 255)),
    }


def is_asked_for(result: Any) -> bool:
    """Whether pictures are of the kind, size and number that the settings ask for, finite, and not of one colour."""
    pictures, settings = result
    prompt, embeddings = settings["prompt"], settings.get("prompt_embeds")
    prompts = len(embeddings) if prompt is None else len(prompt) if isinstance(prompt, list) else 1
    count = prompts * (settings.get("num_images_per_prompt") or 1)
    width, height = settings["width"] or 1024, settings["height"] or 1024
    if settings["output_type"] == "latent":
        sizes = {tuple(pictures.shape)}
        expected = (count, width * height // 256, 64)
        arrays = [pictures.numpy()]
    elif settings["output_type"] == "pil":
        sizes = {(len(pictures), *picture.size) for picture in pictures}
        expected = (count, width, height)
        arrays = [np.asarray(picture, np.float32) / 255 for picture in pictures]
    else:
        pictures = pictures.permute(0, 2, 3, 1).numpy() if settings["output_type"] == "pt" else pictures
        sizes, expected, arrays = {pictures.shape}, (count, height, width, 3), list(pictures)
    return sizes == {expected} and all(np.isfinite(array).all() and array.std() > 0.005 for array in arrays)


def judge(outcomes: Any, world: World, changes: dict[str, Any]) -> None:
    outcomes.judge(lambda: world.generate(changes), is_asked_for)
    assert torch.equal(world.generate({})[0], world.expected), "another picture after the call"
    assert not world.pipeline.transformer._forward_pre_hooks


@given(changes=hostile(COMMON))
def test_settings_of_text_to_image(outcomes, worlds, changes):
    judge(outcomes, worlds[TEXT_TO_IMAGE], changes)


@given(changes=hostile(IMG2IMG))
def test_settings_of_image_to_image(outcomes, worlds, changes):
    judge(outcomes, worlds[TO_IMAGE], changes)


@given(changes=hostile(INPAINT))
def test_settings_of_inpainting(outcomes, worlds, changes):
    judge(outcomes, worlds[TO_PART], changes)


# What the pipelines are made of


@given(
    strategy=st.one_of(st.sampled_from(["auto", "none", "stream", "model"]), ANYTHING),
    vram_gb=st.one_of(st.none(), st.floats(1, 64), ANYTHING),
    device=st.one_of(st.just("cpu"), st.just("cpu"), st.just("tpu"), ANYTHING),
)
def test_offloading(outcomes, worlds, strategy, vram_gb, device):
    world = worlds[TEXT_TO_IMAGE]
    outcomes.judge(
        lambda: world.pipeline.enable_character_offload(strategy, vram_gb, device),
        lambda found: isinstance(found, MemoryPlan) and (strategy != "auto" or found.fits),
    )
    assert torch.equal(world.generate({})[0], world.expected)
    world.pipeline.disable_character_offload()


@given(
    settings=hostile(
        {
            "components": st.one_of(st.just(RELEASED), ODD),
            "vram_bytes": ANYTHING,
            "ram_bytes": ANYTHING,
            "resolution": st.one_of(
                ANYTHING, st.tuples(ANYTHING, ANYTHING), st.lists(st.integers(-1, 2000), max_size=3)
            ),
            "batch": ANYTHING,
            "strategy": st.one_of(st.sampled_from(["auto", "none", "model", "stream", "sequential"]), ANYTHING),
        }
    )
)
def test_memory_plans(outcomes, settings):
    outcomes.judge(
        lambda: plan(**settings), lambda found: found.predicted_peak > 0 and str(found) and "nan" not in str(found)
    )


@given(values=st.lists(st.one_of(FRACTIONS, FRACTIONS, ANYTHING), min_size=3, max_size=5), factor=FRACTIONS)
def test_strengths(outcomes, values, factor):
    def steps() -> list[tuple[float, float]]:
        strength = Strength(*values) * factor
        return [strength.at(i / 28) for i in range(28)]

    outcomes.judge(steps, lambda found: all(0 <= value <= 100 for pair in found for value in pair))


GOOD = torch.rand(1, 3, 80, generator=torch.Generator().manual_seed(2))
FUSED = st.one_of(st.just(GOOD), st.just(GOOD.bfloat16() - 0.3), tensors((1, 3, 80), (1, 4, 80), (1, 3, 79)), ODD)
THUMBNAILS = st.one_of(st.none(), images())


@given(features=st.tuples(FUSED, FUSED), thumbnails=st.tuples(THUMBNAILS, THUMBNAILS), weight=FRACTIONS)
def test_mixed_characters(outcomes, features, thumbnails, weight):
    def mix() -> Character:
        one, other = (Character(fused, "0" * 32, picture) for fused, picture in zip(features, thumbnails, strict=True))
        return one.mix(other, weight)

    def is_between(mixed: Character) -> bool:
        one, other = (fused.float() for fused in features)
        low, high = torch.minimum(one, other), torch.maximum(one, other)
        return bool(((mixed.fused >= low - 0.01) & (mixed.fused <= high + 0.01)).all())

    outcomes.judge(mix, is_between)


LISTS = st.lists(st.one_of(st.integers(-11, 11), st.floats()).map(str), min_size=1, max_size=3).map(", ".join)


@given(
    name=st.one_of(st.sampled_from(["scale", "guidance", "seed"]), ODD), text=st.one_of(LISTS, st.text(max_size=8), ODD)
)
def test_values_of_a_sweep(outcomes, name, text):
    outcomes.judge(lambda: cross({name: parse_values(name, text)}), bool)
