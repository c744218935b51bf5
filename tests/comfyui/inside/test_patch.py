"""Characters on a real ComfyUI MODEL."""

from __future__ import annotations

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from diffusers import FlowMatchEulerDiscreteScheduler
from reference.reference_fill import inputs
from support import recorded
from support.comfyui_sampling import COLUMNS, ROWS, SIGMAS, conditioning, sample, to_latents, to_tokens
from support.recorded import error

from instantcharacter import InstantCharacterPipeline
from instantcharacter.comfyui import model_patch as comfy_patch
from instantcharacter.comfyui.hosting import HostedAdapter
from instantcharacter.comfyui.model_patch import KEY, CharacterConditioning
from instantcharacter.model.conditioning import Subject

EXPECTED = recorded.expected()


@pytest.fixture
def drawn(model, adapter, character):
    """The MODEL with the character on it at 0.9, or as told."""
    return lambda **changes: comfy_patch.apply(
        model, CharacterConditioning(**{"adapter": adapter, "character": character, "scale": 0.9} | changes)
    )


@pytest.fixture
def reference(character, other_character) -> InstantCharacterPipeline:
    """The library's pipeline, on the same weights and the same schedule."""
    unshifted = {"scheduler": FlowMatchEulerDiscreteScheduler()}
    pipeline = InstantCharacterPipeline(**{**recorded.components(), **unshifted})
    pipeline.set_progress_bar_config(disable=True)
    pipeline.set_character_adapter(recorded.adapter())
    return pipeline


def draw(pipeline, **changes) -> torch.Tensor:
    """What the pipeline draws on ``SIGMAS``, as ComfyUI's latents."""
    latents = pipeline(**{**recorded.run_settings(), "sigmas": SIGMAS[:-1].tolist(), **changes})[0]
    return to_latents(latents) / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor


# Exact


@pytest.mark.parametrize("scale", [None, *recorded.CONFIG["scales"]])
def test_flux_is_the_recorded_one(model, drawn, adapter, scale):
    call = recorded.transformer_inputs()
    flux = model.model.diffusion_model
    options = drawn().model_options["transformer_options"]
    if scale is not None:
        scales = [norm.weight.detach() for norm in comfy_patch._query_norms(flux)]
        unfolded = adapter.adapter.attention
        key_scales = [block.key_scale(scale) for block, scale in zip(unfolded, scales, strict=True)]
        tokens = inputs("character_tokens", (2, 16, 64), recorded.SEED)
        part = comfy_patch._Drawn([Subject(tokens, torch.tensor(scale))], unfolded, key_scales)
        options[KEY] = comfy_patch._Step(run=None, drawn=[part], picture_tokens=24, double_blocks=2)
    with torch.no_grad():
        out = flux(
            to_latents(call["hidden_states"]),
            call["timestep"],
            call["encoder_hidden_states"],
            call["pooled_projections"],
            call["guidance"],
            transformer_options=options,
        )
    name = "transformer.plain" if scale is None else f"transformer.scale_{scale}"
    assert error(to_tokens(out), EXPECTED[name]) < 1e-5


def test_plain_sampling_is_the_librarys(model, reference):
    assert error(sample(model), draw(reference)) < 1e-5


def test_one_character_is_the_librarys(drawn, reference, character):
    assert error(sample(drawn()), draw(reference, subject_image=character)) < 1e-5


def test_one_character_in_a_mask_is_the_librarys(drawn, reference, character):
    mask = torch.zeros(64, 96)
    mask[10:50, 20:60] = 1
    theirs = draw(reference, subject_image=character, subject_mask=mask)
    assert error(sample(drawn(mask=mask[None])), theirs) < 1e-5
    assert error(theirs, draw(reference, subject_image=character)) > 1e-3


@pytest.mark.parametrize("masked", [False, True])
def test_two_characters_are_the_librarys(model, adapter, reference, character, other_character, masked):
    left = torch.zeros(64, 96)
    left[:, :48] = 1
    masks = [left, 1 - left] if masked else [None, None]
    twice = model
    for who, scale, mask in zip((character, other_character), (0.9, 0.7), masks):
        twice = comfy_patch.apply(twice, CharacterConditioning(adapter, who, scale, mask=mask))
    theirs = draw(reference, subject_image=[character, other_character], subject_scale=[0.9, 0.7], subject_mask=masks)
    assert error(sample(twice), theirs) < 1e-5


def test_characters_of_two_adapters_add_up(model, adapter, character):
    """Two that share a projector, and so a fingerprint, but not their attention."""
    weights = recorded.adapter()
    weights.attention = recorded.adapter(seed=12).attention
    other = HostedAdapter(weights)
    assert other.fingerprint == adapter.fingerprint
    alone = [
        sample(comfy_patch.apply(model, CharacterConditioning(one, character, 0.9)), sigmas=SIGMAS[-2:])
        for one in (adapter, other)
    ]
    both = model
    for one in (adapter, other):
        both = comfy_patch.apply(both, CharacterConditioning(one, character, 0.9))
    together = sample(both, sigmas=SIGMAS[-2:])
    for one in alone:
        assert error(together, one) > 1e-3
    assert error(alone[0], alone[1]) > 1e-3


def test_true_cfg_is_the_librarys(drawn, reference, character):
    theirs = draw(reference, subject_image=character, true_cfg_scale=2.0, **recorded.negative_prompt())
    assert error(sample(drawn(), cfg=2.0), theirs) < 1e-5


def test_scale_zero_is_plain_flux(model, drawn):
    assert torch.equal(sample(drawn(scale=0.0)), sample(model))


def test_window_is_comfyuis(model, drawn):
    sampling = model.get_model_object("model_sampling")
    middle = 1 - 0.5  # as much of the denoising as of the way
    before, after = sample(drawn(end=middle)), sample(drawn(start=middle))
    threshold = float(sampling.percent_to_sigma(middle))
    due = [sigma >= threshold for sigma in SIGMAS[:-1].tolist()]
    assert True in due
    assert False in due
    by_hand = [sample(drawn(), sigmas=SIGMAS[: 1 + sum(due)]), sample(model, sigmas=SIGMAS[: 1 + sum(due)])]
    assert error(by_hand[0], by_hand[1]) > 1e-3
    assert error(before, after) > 1e-3
    assert error(sample(drawn(start=0.0, end=1.0)), sample(drawn())) == 0


@pytest.mark.parametrize("window", [(0.01, 0.02), (0.0, 0.0), (1.0, 1.0), (0.5, 0.5)])
def test_an_empty_window_is_plain_flux(model, drawn, window):
    start, end = window
    assert torch.equal(sample(drawn(start=start, end=end)), sample(model))


# With everything else


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2m", "dpmpp_sde", "euler_ancestral", "uni_pc"])
def test_any_sampler_draws_the_character(model, drawn, sampler):
    torch.manual_seed(3)
    ours = sample(drawn(), sampler=sampler)
    torch.manual_seed(3)
    assert error(ours, sample(model, sampler=sampler)) > 1e-3


def test_every_picture_of_a_batch_gets_the_character(drawn):
    one, three = sample(drawn()), sample(drawn(), batch=3)
    for i in range(3):
        assert error(three[i : i + 1], one) < 1e-4


def test_a_mask_for_each_picture_of_a_batch(drawn):
    masks = torch.zeros(2, 8, 12)
    masks[0, :, :6] = 1
    masks[1, :, 6:] = 1
    both = sample(drawn(mask=masks), batch=2, cfg=2.0)
    for i in range(2):
        assert error(both[i : i + 1], sample(drawn(mask=masks[i]), cfg=2.0)) < 1e-4


def test_odd_sizes_are_padded_as_comfyui_does(model, drawn):
    noise = torch.randn(1, 16, 7, 9, generator=torch.Generator().manual_seed(0))
    euler = comfy.samplers.sampler_object("euler")

    def odd(on, **settings):
        return comfy.sample.sample_custom(
            on, noise, 1.0, euler, SIGMAS, conditioning(), [], torch.zeros_like(noise), disable_pbar=True
        )

    everywhere = odd(drawn(mask=torch.ones(1, 20, 20)))
    assert error(everywhere, odd(drawn())) < 1e-5
    assert error(everywhere, odd(model)) > 1e-3


def sample_area(on, area: tuple[int, int, int, int], **settings) -> torch.Tensor:
    """Sampled for a prompt for an area alone: height, width, top and left in latents."""
    prompts = [[cond, {**extra, "area": area, "strength": 1.0}] for cond, extra in conditioning()]
    noise = to_latents(recorded.run_settings()["latents"])
    euler = comfy.samplers.sampler_object("euler")
    return comfy.sample.sample_custom(
        on, noise, 1.0, euler, SIGMAS, prompts, prompts, noise * 0, disable_pbar=True, **settings
    )


def test_a_mask_goes_with_a_prompt_for_an_area(model, drawn):
    """Conditioning Set Area, or Set Mask with "mask bounds": FLUX then gets a part of the latents."""
    area = (4, 6, 2, 4)
    plain, everywhere = sample_area(model, area), sample_area(drawn(), area)
    inside, half = torch.zeros(1, 8, 12), torch.zeros(1, 8, 12)
    inside[:, 2:6, 4:10] = 1
    half[:, 2:6, 4:7] = 1
    assert error(sample_area(drawn(mask=torch.ones(1, 20, 30)), area), everywhere) < 1e-5
    assert error(sample_area(drawn(mask=inside), area), everywhere) < 1e-5
    assert torch.equal(sample_area(drawn(mask=1 - inside), area), plain)
    in_half = sample_area(drawn(mask=half), area)
    assert error(in_half, plain) > 1e-3
    assert error(in_half, everywhere) > 1e-3


def test_references_of_kontext_are_left_alone(model, drawn):
    """The tokens of reference latents come after the picture's own, and do not look at the character."""
    seen = []

    def watch(attn, extra_options):
        seen.append((attn.clone(), extra_options["img_slice"][0]))
        return attn

    reference = {"reference_latents": [torch.randn(1, 16, 4, 4)], "guidance": 3.5}
    pooled = {"pooled_output": recorded.prompt()["pooled_prompt_embeds"]}
    positive = [[recorded.prompt()["prompt_embeds"], {**pooled, **reference}]]
    noise = to_latents(recorded.run_settings()["latents"])
    euler = comfy.samplers.sampler_object("euler")
    for on in (model.clone(), drawn()):
        on.set_model_attn1_output_patch(watch)
        comfy.sample.sample_custom(
            on, noise, 1.0, euler, SIGMAS[-2:], positive, [], torch.zeros_like(noise), disable_pbar=True
        )
    (plain, first), (ours, _) = seen[0], seen[4]
    picture = slice(first, first + ROWS * COLUMNS)
    assert plain.shape[1] == first + ROWS * COLUMNS + 4
    assert torch.equal(ours[:, :first], plain[:, :first])
    assert torch.equal(ours[:, picture.stop :], plain[:, picture.stop :])
    assert error(ours[:, picture], plain[:, picture]) > 1e-2


def test_style_lora_on_the_model_adds_up_with_the_character(model, adapter, character, reference):
    lora = comfy.utils.load_torch_file(str(recorded.LORA), safe_load=True)
    styled, _ = comfy.sd.load_lora_for_models(model, None, lora, 0.8, 0.0)
    reference.load_lora_weights(recorded.FOLDER, weight_name=recorded.LORA.name, adapter_name="style")
    reference.set_adapters(["style"], [0.8])
    theirs = draw(reference, subject_image=character)
    before = comfy_patch.apply(styled, CharacterConditioning(adapter, character, 0.9))
    after, _ = comfy.sd.load_lora_for_models(
        comfy_patch.apply(model, CharacterConditioning(adapter, character, 0.9)), None, lora, 0.8, 0.0
    )
    assert error(sample(before), theirs) < 1e-5
    assert error(sample(after), theirs) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("before", [False, True])
def test_a_compute_dtype_may_be_set_before_and_after_the_character(model, adapter, character, dtype, before):
    """The node Model Compute Dtype."""
    on = model.clone()
    if before:
        on.set_model_compute_dtype(dtype)
    on = comfy_patch.apply(on, CharacterConditioning(adapter, character, 0.9))
    if not before:
        on.set_model_compute_dtype(dtype)
    whole, rounded = sample(comfy_patch.apply(model, CharacterConditioning(adapter, character, 0.9))), model.clone()
    rounded.set_model_compute_dtype(dtype)
    rounding = error(sample(rounded), sample(model))
    for _ in range(2):
        assert error(sample(on), whole) < 1.5 * rounding
        assert error(sample(on), sample(rounded)) > 1e-3
    (blocks,) = on.get_additional_models()
    assert {weight.dtype for weight in blocks.model.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_flux_stored_smaller_draws_the_character(adapter, character, reference, dtype):
    """As Load Diffusion Model's weight_dtype does it: stored in fp8 or bf16, computed here in float32."""
    state = {key: weight.to(dtype) for key, weight in recorded.transformer().state_dict().items()}
    copy = {key: weight.clone() for key, weight in state.items()}  # ComfyUI changes what it is given
    stored = comfy.sd.load_diffusion_model_state_dict(copy, model_options={"dtype": dtype})
    assert next(stored.model.diffusion_model.parameters()).dtype == dtype
    stored.set_model_compute_dtype(torch.float32)
    reference.remove_character_adapter()
    reference.transformer.load_state_dict({key: weight.float() for key, weight in state.items()})
    reference.set_character_adapter(recorded.adapter())
    theirs = draw(reference, subject_image=character)
    ours = sample(comfy_patch.apply(stored, CharacterConditioning(adapter, character, 0.9)))
    assert error(ours, theirs) < 1e-5


def test_fluxs_query_scale_is_read_as_it_is_while_sampling(model, adapter, character):
    """A patch on FLUX's query norm does not disturb the character, which has a norm of its own."""
    plain, changed = ({}, {"diffusion_model.double_blocks.0.img_attn.norm.query_norm.weight": (torch.ones(128),)})
    scales = {}
    for name, patches in (("plain", plain), ("changed", changed)):
        on = comfy_patch.apply(model, CharacterConditioning(adapter, character, 0.9))
        on.add_patches(patches, 0.5)
        kept = []

        def note(executor, *args, kept=kept, **kwargs):
            run = args[-1].get(KEY) if isinstance(args[-1], dict) else None
            kept.extend(run.run._scales.values())
            return executor(*args, **kwargs)

        on.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "zzz", note)
        sample(on, sigmas=SIGMAS[-2:])
        scales[name] = kept[0]
    assert not torch.equal(scales["plain"][0], scales["changed"][0])
    assert torch.equal(scales["plain"][1], scales["changed"][1])


def test_original_model_stays_as_it_was(model, drawn):
    before = sample(model)
    sample(drawn())
    assert torch.equal(sample(model), before)
    assert not model.get_attachment(KEY)


def test_clones_of_a_patched_model_draw_the_same(drawn):
    patched = drawn()
    assert torch.equal(sample(patched.clone()), sample(patched))


# Once


def test_tokens_are_made_once_for_a_schedule(drawn, adapter, monkeypatch):
    resampled = []
    resample = adapter.projector.resample

    def counting(fused, timestep, folded=False):
        resampled.extend(timestep.tolist())
        return resample(fused, timestep, folded)

    monkeypatch.setattr(adapter.projector, "resample", counting)
    patched = drawn()
    sample(patched)
    assert resampled == (SIGMAS[:-1] * 1000).tolist()
    sample(patched, seed=5)
    sample(drawn(scale=0.5))
    assert len(resampled) == 4


def test_a_character_with_two_parts_is_resampled_once(model, adapter, character, monkeypatch):
    resampled = []
    resample = adapter.projector.resample

    def counting(fused, timestep, folded=False):
        resampled.extend(timestep.tolist())
        return resample(fused, timestep, folded)

    monkeypatch.setattr(adapter.projector, "resample", counting)
    twice = model
    for window in ({"end": 0.4}, {"start": 0.6}):
        twice = comfy_patch.apply(twice, CharacterConditioning(adapter, character, 0.9, **window))
    first = sample(twice)
    assert len(resampled) == len(set(resampled))
    made = len(resampled)
    assert torch.equal(sample(twice), first)
    assert len(resampled) == made


def test_resampler_is_not_loaded_while_sampling(drawn, adapter):
    def loaded() -> list:
        return [model.model.model for model in comfy.model_management.current_loaded_models]

    during = []
    patched = drawn()
    sample(patched, callback=lambda *_: during.append(loaded()))
    assert during
    assert all(adapter.resampler.model not in models for models in during)
    assert all(adapter.attention(torch.float32).model in models for models in during)


def test_folded_attention_is_made_once_for_an_adapter(drawn):
    one, other = drawn(), drawn()
    for patched in (one, other):
        sample(patched)
    assert one.get_additional_models()[0].model is other.get_additional_models()[0].model


# Errors


def test_old_comfyui_is_refused(drawn, monkeypatch):
    monkeypatch.setattr("comfyui_version.__version__", "0.16.4")
    with pytest.raises(RuntimeError, match=r"needs ComfyUI 0\.17 or newer, this is 0\.16\.4: update ComfyUI"):
        drawn()


def test_other_models_are_refused(drawn, model):
    model.model.diffusion_model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"this MODEL is Linear; InstantCharacter needs FLUX\.1"):
        drawn()


@pytest.mark.parametrize(
    ("part", "name", "advice"),
    [
        ("double_stream_modulation_img", "FLUX.2", "made for FLUX.1"),
        ("distilled_guidance_layer", "Chroma", "made for FLUX.1"),
        ("qweight", "FLUX for Nunchaku", "take FLUX.1 dev, schnell, Krea or Kontext in GGUF"),
    ],
)
def test_other_kinds_of_flux_are_refused_by_name(drawn, model, part, name, advice):
    """As their MODELs have it: told by their parts, with what to take instead."""
    holder = torch.nn.Module()
    setattr(holder, part, torch.nn.Linear(1, 1))
    model.model.diffusion_model.other = holder
    with pytest.raises(ValueError, match=rf"this MODEL is {name}.*{advice}"):
        drawn()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 1}, "number of blocks is 3, the adapter is made for 4"),
        ({"num_attention_heads": 3}, "width is 384, the adapter is made for 256"),
    ],
)
def test_flux_of_another_size_is_refused(adapter, character, changes, message):
    other = comfy.sd.load_diffusion_model_state_dict(recorded.transformer(**changes).state_dict())
    with pytest.raises(ValueError, match=message):
        comfy_patch.apply(other, CharacterConditioning(adapter, character, 0.9))


def test_another_adapters_character_is_refused(drawn, character):
    character.fingerprint = "0" * 32
    with pytest.raises(ValueError, match="made by adapter 0000"):
        drawn()


@pytest.mark.parametrize("window", [{"start": 0.6, "end": 0.4}, {"end": 1.1}, {"start": float("nan")}])
def test_wrong_window_is_refused(drawn, window):
    with pytest.raises(ValueError, match="0 ≤ start ≤ end ≤ 1"):
        drawn(**window)


def test_empty_mask_is_refused(drawn):
    with pytest.raises(ValueError, match="mask is empty"):
        drawn(mask=torch.zeros(1, 8, 8))


def left_out(patched, blocks: list[int]):
    """The MODEL with these double blocks of FLUX left out by another node."""
    for i in blocks:
        patched.set_model_patch_replace(
            lambda args, _: {"img": args["img"], "txt": args["txt"]}, "dit", "double_block", i
        )
    return patched


def test_patches_that_nobody_calls_are_an_error_after_the_first_step(drawn):
    patched, steps = drawn(), []
    patched.model_options["transformer_options"]["patches"].clear()
    with pytest.raises(RuntimeError, match="only 0 of its 4 blocks called.*EasyCache and LazyCache work"):
        sample(patched, callback=lambda step, *_: steps.append(step))
    assert not steps


def test_patches_that_begin_later_are_looked_at_then(drawn):
    patched, steps = drawn(start=0.5), []
    patched.model_options["transformer_options"]["patches"].clear()
    with pytest.raises(RuntimeError, match="only 0 of its 4 blocks called"):
        sample(patched, callback=lambda step, *_: steps.append(step))
    assert 0 < len(steps) < 4


def test_a_few_blocks_that_are_left_out_are_a_warning(drawn, caplog):
    sample(left_out(drawn(), [0]))
    assert "leaves out 1 of FLUX's 4 blocks" in caplog.text


def test_most_blocks_left_out_are_an_error(drawn, monkeypatch):
    monkeypatch.setattr(comfy_patch._Step, "add", lambda step, *_: step.looked.add(0))
    with pytest.raises(RuntimeError, match="only 1 of its 4 blocks called"):
        sample(drawn())


@pytest.mark.parametrize("node", ["EasyCacheNode", "LazyCacheNode"])
@pytest.mark.parametrize("after", [False, True])
def test_comfyuis_caches_work_before_and_after_apply(model, drawn, adapter, character, node, after):
    from comfy_extras import nodes_easycache

    sigmas = torch.linspace(1, 0, 13)

    def cached(on):
        return getattr(nodes_easycache, node).execute(on, 5.0, 0.15, 0.95, False).args[0]

    both = (
        cached(drawn()) if after else comfy_patch.apply(cached(model), CharacterConditioning(adapter, character, 0.9))
    )
    calls = []
    flux = model.model.diffusion_model
    handle = flux.double_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    ours = sample(both, sigmas=sigmas)
    handle.remove()
    assert len(calls) < 12
    assert error(ours, sample(cached(model), sigmas=sigmas)) > 1e-3


def test_sampler_that_goes_around_comfyui_is_an_error(drawn):
    patched = drawn()
    options = {"wrappers": {WrappersMP.DIFFUSION_MODEL: patched.wrappers[WrappersMP.DIFFUSION_MODEL]}}
    call = recorded.transformer_inputs()
    with pytest.raises(RuntimeError, match="Use KSampler"):
        patched.model.diffusion_model(
            to_latents(call["hidden_states"]),
            call["timestep"],
            call["encoder_hidden_states"],
            call["pooled_projections"],
            call["guidance"],
            transformer_options=options,
        )


def test_masks_that_do_not_fit_the_batch_are_refused(drawn):
    with pytest.raises(ValueError, match="2 masks on Apply for a batch of 3"):
        sample(drawn(mask=torch.ones(2, 8, 8)), batch=3)


def test_mask_with_latents_of_a_part_is_refused(drawn):
    """As nodes do that draw a picture in tiles."""

    def in_tiles(executor, latents, *args, **kwargs):
        return executor(latents[..., :4], *args, **kwargs).repeat(1, 1, 1, 3)

    patched = drawn(mask=torch.ones(1, 8, 8))
    wrappers = patched.wrappers[WrappersMP.DIFFUSION_MODEL]
    patched.wrappers[WrappersMP.DIFFUSION_MODEL] = {"tiles": [in_tiles], **wrappers}
    with pytest.raises(ValueError, match="needs latents of the whole picture"):
        sample(patched)


def test_cancelled_sampling_leaves_nothing_behind(drawn, model):
    plain = sample(model)
    patched = drawn()

    def cancel(step, *_):
        comfy.model_management.interrupt_current_processing()
        comfy.model_management.throw_exception_if_processing_interrupted()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(patched, callback=cancel)
    assert torch.equal(sample(model), plain)
    whole = sample(patched)
    assert error(whole, plain) > 1e-3
