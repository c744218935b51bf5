from __future__ import annotations

import gc
from itertools import combinations

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from packaging.version import Version
from PIL import Image
from safetensors.torch import save_file
from support import recorded, tiny
from support.recorded import error

from instantcharacter import (
    Character,
    CharacterFeatures,
    InstantCharacterImg2ImgPipeline,
    InstantCharacterInpaintPipeline,
    InstantCharacterPipeline,
    Strength,
)
from instantcharacter.flux.attn_processor import attach
from instantcharacter.model.conditioning import Subject, add_subjects, mask_to_tokens

CPU_GROUP_OFFLOAD = Version(diffusers.__version__) >= Version("0.36")


def generate(pipeline, **changes) -> torch.Tensor:
    return pipeline(**{**recorded.run_settings(), **changes})[0]


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def plain() -> torch.Tensor:
    """The picture of plain FLUX."""
    return generate(quiet(FluxPipeline(**recorded.components())))


@pytest.fixture
def other_character(adapter) -> Character:
    return Character(adapter.projector.fuse(*recorded.features(seed=99)), adapter.fingerprint())


# Plain FLUX


def test_without_a_character_is_plain_flux(pipeline, plain):
    assert torch.equal(generate(pipeline), plain)


def test_scale_zero_is_plain_flux(pipeline, character, plain):
    assert torch.equal(generate(pipeline, subject_image=character, subject_scale=0), plain)
    assert torch.equal(generate(pipeline, subject_image=[character, character], subject_scale=[0, 0.0]), plain)


def test_scale_zero_encodes_no_picture(pipeline, encoder, monkeypatch):
    pipeline.set_character_encoder(encoder)
    monkeypatch.setattr(encoder, "forward", lambda *_: pytest.fail("the picture was encoded"))
    generate(pipeline, subject_image=recorded.PICTURE, subject_scale=0)


def test_an_empty_window_is_plain_flux(pipeline, character, plain):
    assert torch.equal(generate(pipeline, subject_image=character, subject_start=0.5, subject_end=0.5), plain)


def test_removed_adapter_leaves_plain_flux(pipeline, character, plain):
    generate(pipeline, subject_image=character)
    pipeline.remove_character_adapter()
    assert torch.equal(generate(pipeline), plain)
    assert {type(processor) for processor in pipeline.transformer.attn_processors.values()} == {FluxAttnProcessor}
    assert pipeline.transformer.state_dict().keys() == recorded.transformer().state_dict().keys()
    assert not pipeline.transformer._forward_pre_hooks
    with pytest.raises(ValueError, match="set_character_adapter"):
        generate(pipeline, subject_image=character)


def test_setting_an_adapter_again_replaces_it(pipeline, adapter, character):
    before = generate(pipeline, subject_image=character)
    pipeline.set_character_adapter(adapter)
    assert torch.equal(generate(pipeline, subject_image=character), before)
    pipeline.remove_character_adapter()
    assert {type(processor) for processor in pipeline.transformer.attn_processors.values()} == {FluxAttnProcessor}


# Characters


def test_character_changes_the_picture_more_with_its_scale(pipeline, character, plain):
    changes = [error(generate(pipeline, subject_image=character, subject_scale=s), plain) for s in (0.01, 0.1, 0.9)]
    assert changes == sorted(changes)
    assert changes[0] > 1e-4


def test_a_picture_and_its_character_generate_the_same(pipeline, encoder, character):
    pipeline.set_character_encoder(encoder)
    from_picture = generate(pipeline, subject_image=Image.open(recorded.PICTURE), subject_fit="stretch")
    assert torch.equal(from_picture, generate(pipeline, subject_image=character))


def test_a_loaded_character_generates_the_same(pipeline, character, tmp_path):
    character.save(tmp_path / "fox.safetensors")
    loaded = Character.load(tmp_path / "fox.safetensors")
    assert torch.equal(generate(pipeline, subject_image=loaded), generate(pipeline, subject_image=character))


def test_paths_and_arrays_are_pictures_too(pipeline, encoder):
    pipeline.set_character_encoder(encoder)
    picture = Image.open(recorded.PICTURE).convert("RGB")
    latents = [generate(pipeline, subject_image=p) for p in (picture, recorded.PICTURE, np.asarray(picture))]
    assert torch.equal(latents[0], latents[1])
    assert torch.equal(latents[0], latents[2])


def test_two_halves_of_a_character_are_the_whole(pipeline, character):
    halves = generate(pipeline, subject_image=[character, character], subject_scale=[0.3, 0.6])
    assert error(halves, generate(pipeline, subject_image=character, subject_scale=0.9)) < 1e-4


def test_each_character_has_its_own_scale(pipeline, character, other_character):
    both = [character, other_character]
    one = generate(pipeline, subject_image=both, subject_scale=[0.9, 0])
    assert torch.equal(one, generate(pipeline, subject_image=character, subject_scale=0.9))
    all_alike = generate(pipeline, subject_image=both, subject_scale=0.7)
    assert torch.equal(all_alike, generate(pipeline, subject_image=both, subject_scale=[0.7, 0.7]))
    assert error(all_alike, one) > 1e-2


def test_a_strength_that_does_not_change_is_a_scale(pipeline, character):
    constant, scale = (
        generate(pipeline, subject_image=character, subject_scale=each) for each in (Strength(0.9, 0.9, 0.9), 0.9)
    )
    assert torch.equal(constant, scale)


def test_a_strength_changes_the_picture_over_the_steps_and_by_blocks(pipeline, character, plain):
    strengths = (0.9, Strength(1.2, 0.9, 0.6), Strength(0.9, 0.9, 0.9, 1.5, 0.5), Strength(0.9, 0.9, 0.9, 0.5, 1.5))
    pictures = [plain, *(generate(pipeline, subject_image=character, subject_scale=each) for each in strengths)]
    for one, other in combinations(pictures, 2):
        assert error(one, other) > 1e-3


def test_a_strength_of_zero_is_plain_flux(pipeline, character, plain):
    assert torch.equal(generate(pipeline, subject_image=character, subject_scale=Strength(0, 0, 0)), plain)


def half(side: str) -> torch.Tensor:
    """A mask of the recorded picture's size, white on one side."""
    mask = torch.zeros(64, 96)
    mask[:, {"left": slice(48), "right": slice(48, None)}[side]] = 1
    return mask


def test_white_mask_is_no_mask(pipeline, character):
    everywhere = generate(pipeline, subject_image=character, subject_mask=torch.ones(5, 7))
    assert error(everywhere, generate(pipeline, subject_image=character)) < 1e-6  # a product more, rounded


def test_two_regions_of_a_character_are_the_whole(pipeline, character):
    both = generate(pipeline, subject_image=[character] * 2, subject_mask=[half("left"), half("right")])
    assert error(both, generate(pipeline, subject_image=character)) < 1e-4


def test_character_is_added_in_its_region_only(adapter, fused):
    query, where = torch.randn(1, 24, 2, 128), mask_to_tokens(half("right"), 4, 6)
    hidden = torch.zeros(1, 24, 256)
    tokens = adapter.projector.resample(fused, torch.tensor([500.0]))
    attention = adapter.attention[0]
    with torch.no_grad():
        subject = Subject(tokens, torch.tensor(0.9), where)
        add_subjects(hidden, query, [subject], attention, attention.key_scale(torch.ones(128)))
    hidden = hidden.unflatten(1, (4, 6))
    assert not hidden[:, :, :3].any()
    assert hidden[:, :, 3:].abs().min(dim=-1).values.max() > 0


def test_region_is_the_mean_of_the_mask_over_each_token():
    mask = torch.zeros(8, 8)
    mask[:4, :2] = 1
    assert mask_to_tokens(mask, 2, 2)[0, :, 0].tolist() == [0.5, 0, 0, 0]
    assert mask_to_tokens(mask[None].expand(3, -1, -1), 4, 4).shape == (3, 16, 1)


def test_masks_of_several_characters_and_orders_agree(pipeline, character, other_character):
    one = generate(
        pipeline,
        subject_image=[character, other_character],
        subject_scale=[0.9, 0.6],
        subject_mask=[half("left"), None],
    )
    other = generate(
        pipeline,
        subject_image=[other_character, character],
        subject_scale=[0.6, 0.9],
        subject_mask=[None, half("left")],
    )
    assert error(one, other) < 1e-4
    assert error(one, generate(pipeline, subject_image=[character, other_character], subject_scale=[0.9, 0.6])) > 1e-2


def test_every_picture_of_a_batch_gets_the_character(pipeline, character):
    prompts, negative = recorded.prompt(batch=2), recorded.negative_prompt()
    latents = recorded.run_settings()["latents"]
    settings = {"subject_image": character, "true_cfg_scale": 2.0}
    negatives = {key: value.expand(2, *value.shape[1:]) for key, value in negative.items()}
    batch = generate(pipeline, **prompts, **negatives, **settings, latents=latents.repeat(2, 1, 1))
    for i in range(2):
        prompt = {key: value[i : i + 1] for key, value in prompts.items()}
        assert error(batch[i : i + 1], generate(pipeline, **prompt, **negative, **settings)) < 1e-4


def test_a_prompt_is_no_longer_than_its_tokenizer_allows():
    from support.tiny import tiny_pipeline

    pipeline = tiny_pipeline()
    pipeline.tokenizer_2.model_max_length = 24
    assert pipeline.encode_prompt("a fox", None)[0].shape[1] == 24
    assert pipeline.encode_prompt("a fox", None, max_sequence_length=8)[0].shape[1] == 8


@pytest.mark.parametrize(("guided", "longest"), [(True, 512), (False, 256)])
def test_a_prompt_for_schnell_has_at_most_256_tokens(character, guided, longest):
    """Schnell has no guidance embedding, takes any guidance, and runs in 4 steps."""
    components = tiny.tiny_components() | {"transformer": recorded.transformer(guidance_embeds=guided)}
    pipeline = quiet(InstantCharacterPipeline(**components))
    prompt, _, ids = pipeline.encode_prompt("a fox", None, max_sequence_length=512)
    assert prompt.shape[1] == len(ids) == longest


def test_schnell_takes_the_character_in_four_steps(adapter, character):
    parts = recorded.components() | {"transformer": recorded.transformer(guidance_embeds=False)}
    pipeline = quiet(InstantCharacterPipeline(**parts))
    pipeline.set_character_adapter(adapter)
    plain, ours = (generate(pipeline, subject_image=image, num_inference_steps=4) for image in (None, character))
    assert error(ours, plain) > 1e-3
    assert torch.equal(generate(pipeline, subject_image=character, num_inference_steps=4, guidance_scale=0.0), ours)


def test_prompts_as_text(character):
    from support.tiny import tiny_pipeline

    pipeline = quiet(tiny_pipeline())
    fox = pipeline.create_character(recorded.PICTURE)
    settings = {"height": 32, "width": 48, "num_inference_steps": 2, "output_type": "np"}

    def images(**changes):
        generator = [torch.Generator().manual_seed(i) for i in range(4)]
        both = {"prompt": ["a fox swims", "a fox flies"], "num_images_per_prompt": 2, "generator": generator}
        return pipeline(**{**settings, **both, **changes}).images

    pictures = images(subject_image=fox)
    assert pictures.shape == (4, 32, 48, 3)
    assert np.isfinite(pictures).all()
    assert not np.allclose(pictures, images(), atol=1e-2)


def pooled_prompt(pipeline) -> torch.Tensor:
    return pipeline.encode_prompt("a fox", None)[1].clone()


def save_text_lora(pipeline, folder, name: str, seed: int) -> None:
    """A LoRA of the text encoder, and of a layer of FLUX."""
    torch.manual_seed(seed)
    layers = {
        **{f"text_encoder.{n}": m for n, m in pipeline.text_encoder.named_modules() if n.endswith("q_proj")},
        **{f"transformer.{n}": m for n, m in pipeline.transformer.named_modules() if n.endswith("blocks.0.attn.to_q")},
    }
    weights = {}
    for key, layer in layers.items():
        weights[f"{key}.lora_A.weight"] = torch.randn(4, layer.in_features)
        weights[f"{key}.lora_B.weight"] = torch.randn(layer.out_features, 4)
    save_file(weights, folder / f"{name}.safetensors")


def test_prompts_are_encoded_again_with_another_lora_of_the_same_name(tmp_path):
    from support.tiny import tiny_pipeline

    pipeline = quiet(tiny_pipeline())
    for seed, name in enumerate(("one", "two")):
        save_text_lora(pipeline, tmp_path, name, seed)
    plain, seen = pooled_prompt(pipeline), []
    for name in ("one", "two"):
        pipeline.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name="style")
        seen.append(pooled_prompt(pipeline))
        pipeline.unload_lora_weights()
        gc.collect()
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], plain)
    assert torch.equal(pooled_prompt(pipeline), plain)


def test_prompts_are_encoded_again_by_another_text_encoder_and_in_another_dtype():
    from support.tiny import tiny_pipeline

    pipeline = quiet(tiny_pipeline())
    plain = pooled_prompt(pipeline)
    pipeline.text_encoder = tiny_pipeline(seed=1).text_encoder
    other = pooled_prompt(pipeline)
    assert not torch.equal(other, plain)
    pipeline.text_encoder.to(torch.bfloat16)
    assert pooled_prompt(pipeline).dtype == torch.bfloat16


def test_the_same_character_twice_in_one_picture_is_resampled_once(pipeline, character, resampled):
    twice = generate(pipeline, subject_image=[character, character], subject_scale=[0.4, 0.5])
    assert len(resampled) == 4
    assert error(twice, generate(pipeline, subject_image=character, subject_scale=0.9)) < 1e-4
    assert len(resampled) == 4


def test_style_loras_add_up_with_the_character(pipeline, character):
    bare = generate(pipeline, subject_image=character)
    for name in ("one", "two"):
        pipeline.load_lora_weights(recorded.FOLDER, weight_name=recorded.LORA.name, adapter_name=name)
    pipeline.set_adapters(["one", "two"], [0.5, 0.3])
    together = generate(pipeline, subject_image=character)
    pipeline.set_adapters(["one"], [0.8])
    assert error(together, generate(pipeline, subject_image=character)) < 1e-4
    assert error(together, bare) > 1e-3
    pipeline.unload_lora_weights()
    assert torch.equal(generate(pipeline, subject_image=character), bare)


def test_fused_projections_generate_the_same(pipeline, character):
    before = generate(pipeline, subject_image=character)
    pipeline.transformer.fuse_qkv_projections()
    assert error(generate(pipeline, subject_image=character), before) < 1e-4


def test_attention_backend_reaches_both_attentions(pipeline, character, monkeypatch):
    pipeline.transformer.set_attention_backend("native")
    processor = next(iter(pipeline.transformer.attn_processors.values()))
    assert processor._attention_backend == processor.inner._attention_backend == "native"
    generate(pipeline, subject_image=character)


def test_blocks_that_others_compile_generate_the_same(pipeline, character):
    """One graph a block: nothing in the processor makes the compiler give up."""
    before = generate(pipeline, subject_image=character)
    for block in [*pipeline.transformer.transformer_blocks, *pipeline.transformer.single_transformer_blocks]:
        block.compile(fullgraph=True, backend="eager")
    try:
        generate(pipeline)
    except torch._dynamo.exc.Unsupported:
        pytest.skip("this torch cannot compile FLUX itself")
    # torch 2.13 gives the same bits, 2.11 is 2e-7 away
    assert error(generate(pipeline, subject_image=character), before) < 1e-6


@pytest.mark.skipif(not CPU_GROUP_OFFLOAD, reason="this diffusers offloads groups only beside an accelerator")
def test_group_offloading_generates_the_same(pipeline, character):
    from diffusers.hooks import apply_group_offloading

    before = generate(pipeline, subject_image=character)
    cpu = torch.device("cpu")
    apply_group_offloading(
        pipeline.transformer, onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
    )
    assert torch.equal(generate(pipeline, subject_image=character), before)


def test_sequential_offloading_generates_the_same(pipeline, character):
    from accelerate import cpu_offload

    before = generate(pipeline, subject_image=character)
    for module in (pipeline.transformer, pipeline.vae):
        cpu_offload(module, torch.device("cpu"), offload_buffers=True)
    assert next(pipeline.transformer.parameters()).is_meta
    assert torch.equal(generate(pipeline, subject_image=character), before)


def test_gradients_reach_the_characters_tokens_through_flux(adapter):

    transformer = recorded.transformer()
    attach(transformer, adapter.requires_grad_(True), folded=False)
    tokens = torch.randn(1, 16, 64, requires_grad=True)
    call = recorded.transformer_inputs() | {
        "joint_attention_kwargs": {"subjects": [Subject(tokens, torch.tensor(1.0))], "image_tokens": 24}
    }
    plain_gradients = []
    for checkpointing in (False, True):
        transformer.train(checkpointing)
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        tokens.grad = None
        adapter.zero_grad()
        transformer(**call)[0].pow(2).mean().backward()
        gradients = [tokens.grad, *(p.grad for a in adapter.attention for p in a.parameters())]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
        plain_gradients.append(torch.cat([gradient.flatten() for gradient in gradients]))
    assert error(plain_gradients[1], plain_gradients[0]) < 1e-4


# Steps


def steps_with_character(pipeline, **settings) -> list[bool]:
    """Whether each call of the transformer got subjects."""
    seen = []

    def note(module, args, kwargs):
        seen.append(bool((kwargs.get("joint_attention_kwargs") or {}).get("subjects")))

    attention = pipeline.transformer.transformer_blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        generate(pipeline, **settings)
    finally:
        attention.remove()
    return seen


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0.0, 1.0, [1, 1, 1, 1, 1]),
        (0.4, 1.0, [0, 0, 1, 1, 1]),
        (0.0, 0.6, [1, 1, 1, 0, 0]),
        (0.2, 0.8, [0, 1, 1, 1, 0]),
        (0.3, 0.7, [0, 0, 1, 0, 0]),
    ],
)
def test_window_is_fractions_of_the_schedule(pipeline, character, start, end, expected):
    window = {"subject_start": start, "subject_end": end}
    seen = steps_with_character(pipeline, subject_image=character, num_inference_steps=5, **window)
    assert seen == [bool(step) for step in expected]


def test_both_branches_of_true_cfg_get_the_character(pipeline, character):
    cfg = {"true_cfg_scale": 2.0, **recorded.negative_prompt()}
    assert steps_with_character(pipeline, subject_image=character, subject_end=0.5, **cfg) == [True] * 4 + [False] * 4


def test_tokens_follow_the_schedule(pipeline, character, resampled):
    generate(pipeline, subject_image=character)
    assert resampled == pipeline.scheduler.timesteps.tolist()
    assert len(resampled) == 4


def test_second_run_computes_no_features_no_fuse_no_resample(pipeline, encoder, adapter, monkeypatch):
    pipeline.set_character_encoder(encoder)
    first = generate(pipeline, subject_image=Image.open(recorded.PICTURE))
    for owner, name in ((encoder, "forward"), (adapter.projector, "fuse"), (adapter.projector, "resample")):
        monkeypatch.setattr(owner, name, lambda *_, name=name, **__: pytest.fail(f"{name} was computed again"))
    assert torch.equal(generate(pipeline, subject_image=Image.open(recorded.PICTURE)), first)
    generate(pipeline, subject_image=recorded.PICTURE, subject_scale=0.5, latents=first)


def test_another_picture_or_fit_is_another_character(pipeline):
    pipeline.set_character_encoder(QuickEncoder())
    picture = Image.open(recorded.PICTURE)
    first = pipeline.create_character(picture)
    assert pipeline.create_character(picture) is first
    assert pipeline.create_character(picture, "stretch") is not first
    assert pipeline.create_character(picture.rotate(90)) is not first


class QuickEncoder(torch.nn.Module):
    """Features from the mean of a picture, at once."""

    def forward(self, image, fit="pad"):
        mean = np.asarray(image).mean() / 255
        return CharacterFeatures(*(tensor + mean for tensor in recorded.features(tokens=3)))


def test_characters_of_few_pictures_are_cached(pipeline):
    pipeline.set_character_encoder(QuickEncoder())
    grey = [Image.new("RGB", (8, 8), (i, i, i)) for i in range(6)]
    characters = [pipeline.create_character(picture) for picture in grey]
    assert pipeline.create_character(grey[5]) is characters[5]
    assert pipeline.create_character(grey[0]) is not characters[0]


def test_interrupted_run_leaves_nothing_behind(pipeline, character, plain):
    def cancel(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipeline, subject_image=character, callback_on_step_end=cancel)
    assert not pipeline.transformer._forward_pre_hooks
    assert torch.equal(generate(pipeline), plain)


# Other pipelines


def picture_settings(mask: bool) -> dict[str, object]:
    settings = {key: value for key, value in recorded.run_settings().items() if key != "latents"}
    image = Image.open(recorded.PICTURE).convert("RGB").resize((96, 64))
    settings |= {"image": image, "strength": 0.5, "generator": torch.Generator().manual_seed(3)}
    if mask:
        settings["mask_image"] = Image.new("L", (96, 64), 255)
    return settings


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (InstantCharacterImg2ImgPipeline, FluxImg2ImgPipeline),
        (InstantCharacterInpaintPipeline, FluxInpaintPipeline),
    ],
)
def test_image_to_image_and_inpainting(ours, theirs, adapter, character):
    mask = theirs is FluxInpaintPipeline
    pipeline = quiet(ours(**recorded.components()))
    pipeline.set_character_adapter(adapter)
    with_character = pipeline(**picture_settings(mask), subject_image=character)[0]
    without = quiet(theirs(**recorded.components()))(**picture_settings(mask))[0]
    assert torch.equal(pipeline(**picture_settings(mask))[0], without)
    assert error(with_character, without) > 1e-2


def test_image_to_image_window_counts_the_steps_that_run(adapter, character):
    pipeline = quiet(InstantCharacterImg2ImgPipeline(**recorded.components()))
    pipeline.set_character_adapter(adapter)
    settings = picture_settings(mask=False) | {"num_inference_steps": 8, "subject_image": character, "latents": None}
    assert steps_with_character(pipeline, **settings, subject_start=0.5) == [False, False, True, True]


def test_pipelines_may_share_a_transformer(pipeline, adapter, character):
    before = generate(pipeline, subject_image=character)
    second = quiet(InstantCharacterImg2ImgPipeline(**pipeline.components))
    with pytest.raises(ValueError, match="set_character_adapter"):
        second(**picture_settings(mask=False), subject_image=character)
    second.set_character_adapter(adapter)
    second(**picture_settings(mask=False), subject_image=character)
    assert torch.equal(generate(pipeline, subject_image=character), before)
    second.set_character_adapter(recorded.adapter(seed=7))
    with pytest.raises(ValueError, match="does not carry its character adapter"):
        generate(pipeline, subject_image=character)


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"subject_scale": float("nan")}, "finite"),
        ({"subject_scale": float("inf")}, "finite"),
        ({"subject_scale": [0.5, 0.5]}, "2 subject_scale for 1 characters"),
        ({"subject_image": []}, "empty"),
        ({"subject_image": [None]}, "None in it"),
        ({"subject_start": 0.7, "subject_end": 0.3}, "subject_start 0.7 and subject_end 0.3"),
        ({"subject_end": 1.5}, "0 ≤ start ≤ end ≤ 1"),
        ({"subject_start": float("nan")}, "0 ≤ start ≤ end ≤ 1"),
        ({"subject_image": recorded.PICTURE}, "set_character_encoder"),
        ({"subject_mask": [None, None]}, "2 subject_mask for 1 characters"),
        ({"subject_mask": torch.zeros(4, 4)}, "mask is empty"),
    ],
)
def test_wrong_settings_are_refused_before_generating(pipeline, character, monkeypatch, settings, message):
    monkeypatch.setattr(pipeline.transformer, "forward", lambda *_, **__: pytest.fail("FLUX ran"))
    with pytest.raises(ValueError, match=message):
        generate(pipeline, **{"subject_image": character, **settings})


def test_wrong_settings_are_refused_without_a_character_too(pipeline):
    with pytest.raises(ValueError, match="finite"):
        generate(pipeline, subject_scale=float("nan"))


def test_character_without_adapter_is_refused(character):
    pipeline = quiet(InstantCharacterPipeline(**recorded.components()))
    with pytest.raises(ValueError, match="set_character_adapter"):
        generate(pipeline, subject_image=character)


def test_another_adapters_character_is_refused(pipeline, character):
    other = recorded.adapter(seed=7)
    foreign = Character(character.fused, other.fingerprint())
    with pytest.raises(
        ValueError, match=rf"adapter {other.fingerprint()}, the one to draw it is {character.fingerprint}"
    ):
        generate(pipeline, subject_image=foreign)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, "width is 384, the adapter is made for 256"),
        ({"num_layers": 1}, "number of blocks is 3, the adapter is made for 4"),
        ({"num_attention_heads": 4, "attention_head_dim": 64, "axes_dims_rope": [8, 28, 28]}, "heads is 4, .* for 2"),
    ],
)
def test_wrong_transformer_is_refused(adapter, changes, message):
    pipeline = InstantCharacterPipeline(**{**recorded.components(), "transformer": recorded.transformer(**changes)})
    with pytest.raises(ValueError, match=message):
        pipeline.set_character_adapter(adapter)
    assert {type(processor) for processor in pipeline.transformer.attn_processors.values()} == {FluxAttnProcessor}


def test_ip_adapter_in_the_way_is_refused(adapter):
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    pipeline = InstantCharacterPipeline(**recorded.components())
    block = pipeline.transformer.transformer_blocks[0]
    block.attn.set_processor(FluxIPAdapterAttnProcessor(hidden_size=256, cross_attention_dim=64))
    with pytest.raises(ValueError, match="unload it first"):
        pipeline.set_character_adapter(adapter)


def test_a_processor_that_hides_its_query_is_refused(pipeline, character):
    for processor in pipeline.transformer.attn_processors.values():
        processor.inner = lambda attn, hidden_states, *_: attn.to_out[0](hidden_states)
    with pytest.raises(RuntimeError, match=r"does not normalise its query by attn.norm_q"):
        generate(pipeline, subject_image=character)


def test_offloaded_transformer_is_refused(adapter):
    from accelerate import cpu_offload

    pipeline = InstantCharacterPipeline(**recorded.components())
    cpu_offload(pipeline.transformer, torch.device("cpu"))
    with pytest.raises(ValueError, match="set the character adapter before enabling offload"):
        pipeline.set_character_adapter(adapter)


def test_dead_channel_in_fluxs_query_norm_is_refused(adapter):
    pipeline = InstantCharacterPipeline(**recorded.components())
    pipeline.transformer.single_transformer_blocks[1].attn.norm_q.weight[5] = 0
    with pytest.raises(ValueError, match="scale of 0"):
        pipeline.set_character_adapter(adapter)
