from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from support import recorded
from support.tiny import byte_tokenizer, tiny_components

from instantcharacter import InstantCharacterImg2ImgPipeline, InstantCharacterPipeline
from instantcharacter.flux.settings import bind, prompt_length

NAN, INF = float("nan"), float("inf")
GOOD = {
    "prompt": "a fox",
    "width": 32,
    "height": 16,
    "num_inference_steps": 2,
    "max_sequence_length": 8,
    "output_type": "pt",
    "return_dict": False,
}


@pytest.fixture(scope="module")
def whole() -> InstantCharacterPipeline:
    """The recorded pipeline with text encoders; no test changes it."""
    return build(InstantCharacterPipeline)


@pytest.fixture(scope="module")
def to_image() -> InstantCharacterImg2ImgPipeline:
    return build(InstantCharacterImg2ImgPipeline)


def build(kind):
    texts = {name: part for name, part in tiny_components().items() if "text" in name or "tokenizer" in name}
    pipeline = kind(**recorded.components() | texts)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.set_character_adapter(recorded.adapter())
    return pipeline


def generate(pipeline, **changes) -> torch.Tensor:
    return pipeline(**{**GOOD, "generator": torch.Generator().manual_seed(1), **changes})[0]


def embeddings(rows: int = 1, tokens: int = 8, dtype: torch.dtype = torch.float32, value: float = 0.5) -> dict:
    prompt = torch.full((rows, tokens, 64), value, dtype=dtype)
    return {"prompt": None, "prompt_embeds": prompt, "pooled_prompt_embeds": torch.full((rows, 32), 0.5, dtype=dtype)}


def negative(rows: int = 1, tokens: int = 8) -> dict:
    passed = embeddings(rows, tokens)
    return {f"negative_{name}": value for name, value in passed.items() if value is not None} | {"true_cfg_scale": 2.0}


REFUSED = [
    *[({"guidance_scale": value}, "guidance_scale is .*; expected a finite number from 0 to 100") for value in
      (NAN, INF, -1, 1e30, "3.5", None, True)],
    *[({"true_cfg_scale": value}, "true_cfg_scale is .*; expected a finite number") for value in (NAN, INF, -1, "2")],
    *[({"num_inference_steps": value}, "num_inference_steps is .*; expected a whole number from 1") for value in
      (0, -1, 1.5, NAN, None, "4", 10**9)],
    *[({"num_images_per_prompt": value}, "num_images_per_prompt is .*; expected a whole number") for value in
      (0, -1, 1.0, "1", 10**9)],
    *[({"max_sequence_length": value}, "max_sequence_length is .*; expected a whole number from 1 to 512") for value in
      (0, 513, NAN, None)],
    *[({name: value}, f"{name} is .*; expected a whole number from 16") for name in ("width", "height") for value in
      (0, -16, 16.0, "32", NAN, 2**40)],
    ({"width": 40}, "width is 40; expected a multiple of 16 pixels"),
    *[({"prompt": value}, "prompt is .*; expected a text, or a list with a text") for value in
      ([], [1], ("a",), 3, b"")],
    *[({name: "a \ud800"}, f"{name} is .*half of a letter") for name in
      ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")],
    ({"prompt": ["a", "\udfff"]}, "half of a letter"),
    ({"prompt_2": ["a", "b"]}, "prompt is for 2 pictures, and 1 are asked for"),
    ({"negative_prompt": ["a", "b"], "true_cfg_scale": 2}, "negative_prompt is for 2 pictures, and 1 are asked for"),
    ({"prompt": None}, "diffusers refuses these settings: Provide either `prompt` or `prompt_embeds`"),
    ({**embeddings(), "prompt": "a"}, "diffusers refuses these settings: Cannot forward both `prompt`"),
    ({"callback_on_step_end_tensor_inputs": ["noise"]}, "diffusers refuses .* has to be in"),
    ({"pooled_prompt_embeds": torch.ones(1, 32)}, "prompt_embeds is None; expected a tensor"),
    ({**embeddings(), "pooled_prompt_embeds": None}, "pooled_prompt_embeds is None; expected a tensor"),
    ({**embeddings(), "pooled_prompt_embeds": torch.ones(2, 32)}, r"pooled_prompt_embeds is .*; expected .* \[1, 32\]"),
    *[(embeddings(value=value), "prompt_embeds has values .*; expected finite ones") for value in (NAN, INF, 1e30)],
    (embeddings(dtype=torch.float64), r"in torch.float64; expected a tensor \[any, any, 64\] in torch.float32"),
    ({**embeddings(), "prompt_embeds": torch.ones(1, 8, 65)}, r"prompt_embeds is a Tensor \[1, 8, 65\]"),
    ({**embeddings(), "prompt_embeds": "a fox"}, "prompt_embeds is 'a fox'"),
    (embeddings(2) | {"num_images_per_prompt": 2}, "prompt_embeds is for 2 pictures, and 4 are asked for"),
    ({"negative_prompt_embeds": torch.ones(1, 8, 64)}, "negative_pooled_prompt_embeds is None"),
    (negative(2), "negative_prompt_embeds is for 2 pictures"),
    *[({"latents": value}, r"latents is .*; expected a tensor \[1, 2, 64\]") for value in
      (torch.ones(1, 3, 64), torch.ones(1, 16, 2, 4), torch.ones(2, 64), np.ones((1, 2, 64)), torch.ones(2, 2, 64),
       torch.ones(1, 2, 64, dtype=torch.int64), "noise")],
    *[({"latents": torch.full((1, 2, 64), value)}, "latents has values") for value in (NAN, INF, 1e30)],
    *[({"generator": value}, "generator is .*; expected") for value in
      (7, "cpu", [], [torch.Generator()] * 2, [None], (torch.Generator(),))],
    *[({"sigmas": value}, "sigmas is .*; expected") for value in ([], "1", 0.5, [0.5, 1.0], [1.0, 1.0], torch.ones(1))],
    *[({"sigmas": [1.0, value]}, "a value of sigmas is") for value in (NAN, INF, 0, -1, "0.5", [0.5])],
    *[({"output_type": value}, "output_type is .*; expected one of pil, np, pt, latent") for value in
      ("jpeg", None, [])],
    ({"return_dict": np.ones(2)}, "return_dict is .*; expected True or False"),
    *[({"joint_attention_kwargs": value}, "joint_attention_kwargs is .*; expected a dict") for value in
      ([], "x", {1: 2})],
    *[({"joint_attention_kwargs": {name: 1}}, f"has '{name}', which FLUX sets itself") for name in
      ("subjects", "image_tokens", "hidden_states", "ip_hidden_states", "ip_adapter_image_embeds")],
    *[({"joint_attention_kwargs": {"scale": value}}, "scale'] is .*; expected a finite number") for value in
      (NAN, "1")],
    ({"ip_adapter_image": np.ones((8, 8, 3))}, "ip_adapter_image is .* no IP-Adapter is loaded"),
    *[({"callback_on_step_end": value}, "callback_on_step_end is .*; expected a function") for value in (0, "x", [])],
    ({"callback_on_step_end_tensor_inputs": "latents"}, "expected a list such as"),
    ({"callback_on_step_end_tensor_inputs": None, "callback_on_step_end": print}, "expected a list such as"),
    *[({"subject_scale": value}, "subject_scale is .*; expected a finite number from -10 to 10") for value in
      ("0.9", None, 1e30, [0.5, None], True)],
    *[({"subject_start": value}, "subject_start .* expected 0 ≤ start ≤ end ≤ 1") for value in (None, "0", 2)],
    *[({"subject_fit": value}, "subject_fit is .*; expected one of pad, stretch") for value in ("crop", None, [])],
    *[({"cache_threshold": value}, "cache_threshold is .*; expected a finite number") for value in
      (NAN, -1, "0.1", None)],
    *[({"subject_mask": value}, "mask|picture|int|float") for value in
      (torch.zeros(4, 4), torch.full((4, 4), NAN), np.full((4, 4), 255), np.ones((4, 4), np.uint8), 3, {})],
]  # fmt: skip
"""Settings, and what is said of them."""


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_a_setting_is_refused_before_any_weight_moves(whole, character, monkeypatch, settings, message):
    for owner, name in ((whole, "encode_prompt"), (whole._state.offload, "run"), (whole.transformer, "forward")):
        monkeypatch.setattr(owner, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))
    with pytest.raises(ValueError, match=message):
        generate(whole, subject_image=character, **settings)


def test_a_bad_picture_is_refused_before_a_good_one_is_encoded(pipeline, encoder, monkeypatch):
    monkeypatch.setattr(encoder, "forward", lambda *_: pytest.fail("a picture was encoded"))
    pipeline.set_character_encoder(encoder)
    with pytest.raises(ValueError, match="not a picture"):
        generate(pipeline, **embeddings(), subject_image=[recorded.PICTURE, 3])
    with pytest.raises(ValueError, match="mask is empty"):
        generate(pipeline, **embeddings(), subject_image=recorded.PICTURE, subject_mask=torch.zeros(4, 4))


def test_arguments_that_the_call_does_not_take_are_named(whole):
    with pytest.raises(TypeError, match="does not take these arguments: .*'timesteps'"):
        generate(whole, timesteps=[1000])
    with pytest.raises(TypeError, match="does not take these arguments: .*'prompt'"):
        whole("a fox", prompt="a fox")


def test_a_call_has_its_defaults_and_one_picture_for_none(whole):
    call = bind(FluxPipeline.__call__, (whole, "a fox"), {"num_images_per_prompt": None})
    assert call.arguments["num_images_per_prompt"] == 1
    assert call.arguments["guidance_scale"] == 3.5


ACCEPTED = [
    {"num_images_per_prompt": None},
    {"guidance_scale": 0, "true_cfg_scale": 0},
    {"guidance_scale": np.float32(3.5), "num_inference_steps": np.int64(2)},
    {"prompt": ["a", "b"], "prompt_2": "c", "negative_prompt": "d", "true_cfg_scale": 2.0},
    {"prompt": ["a", "b"], "prompt_2": ["c", "d"], "negative_prompt": ["e", "f"], "true_cfg_scale": 2.0},
    {"prompt": "", "num_images_per_prompt": 3, "negative_prompt": "", "true_cfg_scale": 2.0},
    {"prompt": ["a", "b"], "negative_prompt": ["one", "for", "none"]},
    {**embeddings(), "num_images_per_prompt": 2},
    {**embeddings(2)},
    {**embeddings(), **negative()},
    {**negative(tokens=5)},
    {"latents": torch.ones(1, 2, 64, dtype=torch.float64)},
    {"sigmas": [1.0, 0.5], "num_inference_steps": 7},
    {"sigmas": np.array([1.0, 0.25])},
    {"generator": None},
    {"prompt": ["a", "b"], "generator": [torch.Generator(), torch.Generator()]},
    {"joint_attention_kwargs": {}},
    {"joint_attention_kwargs": {"scale": 0.5}},
    {"callback_on_step_end": lambda pipe, step, timestep, tensors: {}},
    {"callback_on_step_end_tensor_inputs": None},
    {"return_dict": 0},
    {"max_sequence_length": 512, "prompt": "x" * 1000},
    {"subject_scale": np.float64(0.9)},
]


@pytest.mark.parametrize("settings", ACCEPTED)
def test_good_settings_of_every_kind_generate(whole, character, settings):
    prompts = settings["prompt_embeds"] if settings.get("prompt_embeds") is not None else settings.get("prompt")
    count = 1 if prompts is None or isinstance(prompts, str) else len(prompts)
    pictures = generate(whole, subject_image=character, **settings)
    assert pictures.shape == (count * (settings.get("num_images_per_prompt") or 1), 3, 16, 32)
    assert pictures.isfinite().all()
    assert pictures.std() > 0.005


def test_without_text_encoders_a_prompt_is_refused(pipeline):
    with pytest.raises(ValueError, match="has no text_encoder, so that it encodes no prompt: pass prompt_embeds"):
        generate(pipeline)
    with pytest.raises(ValueError, match="encodes no negative_prompt: pass negative_prompt_embeds"):
        generate(pipeline, **embeddings(), negative_prompt="a", true_cfg_scale=2.0)
    assert generate(pipeline, **embeddings(), negative_prompt="a").shape == (1, 3, 16, 32)


@pytest.mark.parametrize(
    ("result", "message"),
    [(None, "returned None; expected a dict"), ({"latents": 3}, "returned latents 3; expected a tensor"),
     ({"prompt_embeds": None}, "returned prompt_embeds None; expected a tensor"),
     ({"latents": torch.ones(1)}, r"returned latents a Tensor \[1\]")],
)  # fmt: skip
def test_what_a_callback_returns_is_checked(whole, result, message):
    with pytest.raises(ValueError, match=message):
        generate(whole, callback_on_step_end=lambda *_: result)


def test_an_image_pipeline_needs_as_many_tokens_of_both_prompts(to_image):
    """Image-to-image gives the negative prompt the prompt's positions."""
    picture = torch.rand(3, 16, 32)
    with pytest.raises(ValueError, match=r"prompt and negative prompt have \[5, 8\] tokens"):
        generate(to_image, image=picture, **negative(tokens=5))
    assert generate(to_image, image=picture, **negative(tokens=8)).shape == (1, 3, 16, 32)


@pytest.mark.parametrize(
    ("steps", "strength", "runs"), [(2, 0.1, True), (2, 1, True), (2, 0, False), (9, 1e-20, False)]
)
def test_a_strength_that_leaves_no_step_is_refused(to_image, steps, strength, runs):
    settings = {"image": torch.rand(3, 16, 32), "num_inference_steps": steps, "strength": strength}
    if runs:
        assert generate(to_image, **settings).isfinite().all()
    else:
        with pytest.raises(ValueError, match="leaves no step: expected a greater one"):
            generate(to_image, **settings)
    for value in (NAN, -0.1, 1.1, "0.5", None):
        with pytest.raises(ValueError, match="strength is .*; expected a finite number from 0 to 1"):
            generate(to_image, **settings | {"strength": value})


@pytest.mark.parametrize(("guided", "longest"), [(True, 300), (False, 256)])
def test_a_prompt_has_no_more_tokens_than_t5_and_flux_allow(guided, longest):
    whole = build(InstantCharacterPipeline)
    whole.transformer = recorded.transformer(guidance_embeds=guided)
    whole.tokenizer_2 = byte_tokenizer(300)
    assert [prompt_length(whole, asked) for asked in (8, 512)] == [8, longest]
