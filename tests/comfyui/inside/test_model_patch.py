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
from support.pretended_cuda import PretendedCuda
from support.recorded import error

from instantcharacter import InstantCharacterPipeline, Strength
from instantcharacter.comfyui import hosting, sampling_state
from instantcharacter.comfyui.conditioning import CharacterConditioning
from instantcharacter.comfyui.hosting import HostedAdapter, HostedAttention
from instantcharacter.comfyui.internals import query_norms
from instantcharacter.comfyui.model_patch import KEY, apply
from instantcharacter.comfyui.sampling_state import AdapterState, SamplingState, StepState
from instantcharacter.model.conditioning import Subject
from instantcharacter.model.folding import fold

CPU = torch.device("cpu")
EXPECTED = recorded.expected()


@pytest.fixture
def patch(model, adapter, character):
    """The MODEL with the character at a scale of 0.9, or with other settings."""
    return lambda **changes: apply(
        model, CharacterConditioning(**{"adapter": adapter, "character": character, "scale": 0.9} | changes)
    )


@pytest.fixture
def reference(character, other_character) -> InstantCharacterPipeline:
    """The library's pipeline, on the same weights and the same schedule."""
    unshifted = {"scheduler": FlowMatchEulerDiscreteScheduler()}
    pipeline = InstantCharacterPipeline(**{**recorded.components(), **unshifted})
    pipeline.set_progress_bar_config(disable=True)
    pipeline.set_character_adapter(recorded.adapter(), "cpu")
    return pipeline


def generate(pipeline, **changes) -> torch.Tensor:
    """The pipeline's result on the schedule ``SIGMAS``, as ComfyUI's latents."""
    latents = pipeline(**{**recorded.run_settings(), "sigmas": SIGMAS[:-1].tolist(), **changes})[0]
    return to_latents(latents) / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor


# Exact


@pytest.mark.parametrize("scale", [None, *recorded.CONFIG["scales"]])
def test_flux_equals_the_recorded_vectors(model, patch, adapter, scale):
    call = recorded.transformer_inputs()
    flux = model.model.diffusion_model
    options = patch().model_options["transformer_options"]
    if scale is not None:
        scales = [norm.weight.detach() for norm in query_norms(flux)]
        unfolded = adapter.adapter.attention
        key_scales = [block.key_scale(scale) for block, scale in zip(unfolded, scales, strict=True)]
        tokens = inputs("character_tokens", (2, 16, 64), recorded.SEED)
        attention = HostedAttention(unfolded, CPU)
        state = AdapterState([Subject(tokens, torch.tensor(scale))], attention, key_scales)
        options[KEY] = StepState(adapters=[state], image_tokens=24, double_blocks=2)
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


def test_plain_sampling_equals_the_library(model, reference):
    assert error(sample(model), generate(reference)) < 1e-5


def test_one_character_equals_the_library(patch, reference, character):
    assert error(sample(patch()), generate(reference, subject_image=character)) < 1e-5


def test_one_character_with_a_mask_equals_the_library(patch, reference, character):
    mask = torch.zeros(64, 96)
    mask[10:50, 20:60] = 1
    theirs = generate(reference, subject_image=character, subject_mask=mask)
    assert error(sample(patch(mask=mask[None])), theirs) < 1e-5
    assert error(theirs, generate(reference, subject_image=character)) > 1e-3


@pytest.mark.parametrize("masked", [False, True])
def test_two_characters_equal_the_library(model, adapter, reference, character, other_character, masked):
    left = torch.zeros(64, 96)
    left[:, :48] = 1
    masks = [left, 1 - left] if masked else [None, None]
    twice = model
    for who, scale, mask in zip((character, other_character), (0.9, 0.7), masks):
        twice = apply(twice, CharacterConditioning(adapter, who, scale, mask=mask))
    theirs = generate(
        reference, subject_image=[character, other_character], subject_scale=[0.9, 0.7], subject_mask=masks
    )
    assert error(sample(twice), theirs) < 1e-5


def test_characters_of_two_adapters_add_up(model, adapter, character):
    """Two that share a projector, and so a fingerprint, but not their attention."""
    weights = recorded.adapter()
    weights.attention = recorded.adapter(seed=12).attention
    other = HostedAdapter(weights)
    assert other.fingerprint == adapter.fingerprint
    alone = [
        sample(apply(model, CharacterConditioning(one, character, 0.9)), sigmas=SIGMAS[-2:]) for one in (adapter, other)
    ]
    both = model
    for one in (adapter, other):
        both = apply(both, CharacterConditioning(one, character, 0.9))
    together = sample(both, sigmas=SIGMAS[-2:])
    for one in alone:
        assert error(together, one) > 1e-3
    assert error(alone[0], alone[1]) > 1e-3


def test_true_cfg_equals_the_library(patch, reference, character):
    theirs = generate(reference, subject_image=character, true_cfg_scale=2.0, **recorded.negative_prompt())
    assert error(sample(patch(), cfg=2.0), theirs) < 1e-5


def test_scale_zero_is_plain_flux(model, patch):
    assert torch.equal(sample(patch(scale=0.0)), sample(model))


@pytest.mark.parametrize(
    "strength", [Strength(1.2, 0.9, 0.6), Strength(0.9, 0.9, 0.9, 0.5, 1.5), Strength(0.3, 1.0, 0.5, 1.2, 0.8)]
)
def test_a_strength_over_time_and_blocks_equals_the_library(model, patch, reference, character, strength):
    """At timesteps that are fractions of the denoising as ComfyUI counts it; the library counts steps."""
    sampling = model.get_model_object("model_sampling")
    sigmas = torch.tensor([sampling.percent_to_sigma(i / 4) for i in range(5)])
    theirs = generate(reference, subject_image=character, subject_scale=strength, sigmas=sigmas[:-1].tolist())
    ours = sample(patch(scale=strength), sigmas=sigmas)
    assert error(ours, theirs) < 1e-5
    assert error(ours, sample(patch(), sigmas=sigmas)) > 1e-3


def test_a_strength_that_does_not_change_is_a_scale(patch):
    assert torch.equal(sample(patch(scale=Strength(0.9, 0.9, 0.9))), sample(patch()))


def test_each_character_has_its_own_strength(model, patch, adapter, character, reference, other_character):
    strengths = [Strength(1.2, 0.9, 0.6), 0.7]
    sampling = model.get_model_object("model_sampling")
    sigmas = torch.tensor([sampling.percent_to_sigma(i / 4) for i in range(5)])
    twice = apply(patch(scale=strengths[0]), CharacterConditioning(adapter, other_character, strengths[1]))
    both = {"subject_image": [character, other_character], "subject_scale": strengths}
    assert error(sample(twice, sigmas=sigmas), generate(reference, **both, sigmas=sigmas[:-1].tolist())) < 1e-5


def test_a_strength_goes_on_where_a_sampling_in_two_parts_goes_on(patch):
    """As with two KSampler (Advanced), or SplitSigmas."""
    falls = patch(scale=Strength(1.2, 0.9, 0.6))
    first = sample(falls, sigmas=SIGMAS[:3])
    euler = comfy.samplers.sampler_object("euler")
    noise, rest = torch.zeros_like(first), SIGMAS[2:]
    second = comfy.sample.sample_custom(falls, noise, 1.0, euler, rest, conditioning(), [], first, disable_pbar=True)
    assert error(second, sample(falls)) < 1e-5


def test_start_and_end_count_as_comfyui_does(model, patch):
    sampling = model.get_model_object("model_sampling")
    middle = 1 - 0.5  # as much of the denoising as of the way
    before, after = sample(patch(end=middle)), sample(patch(start=middle))
    threshold = float(sampling.percent_to_sigma(middle))
    due = [sigma >= threshold for sigma in SIGMAS[:-1].tolist()]
    assert True in due
    assert False in due
    by_hand = [sample(patch(), sigmas=SIGMAS[: 1 + sum(due)]), sample(model, sigmas=SIGMAS[: 1 + sum(due)])]
    assert error(by_hand[0], by_hand[1]) > 1e-3
    assert error(before, after) > 1e-3
    assert error(sample(patch(start=0.0, end=1.0)), sample(patch())) == 0


@pytest.mark.parametrize("window", [(0.01, 0.02), (0.0, 0.0), (1.0, 1.0), (0.5, 0.5)])
def test_an_empty_window_is_plain_flux(model, patch, window):
    start, end = window
    assert torch.equal(sample(patch(start=start, end=end)), sample(model))


# With everything else


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2m", "dpmpp_sde", "euler_ancestral", "uni_pc"])
def test_any_sampler_applies_the_character(model, patch, sampler):
    torch.manual_seed(3)
    ours = sample(patch(), sampler=sampler)
    torch.manual_seed(3)
    assert error(ours, sample(model, sampler=sampler)) > 1e-3


def test_every_picture_of_a_batch_gets_the_character(patch):
    one, three = sample(patch()), sample(patch(), batch=3)
    for i in range(3):
        assert error(three[i : i + 1], one) < 1e-4


def test_a_mask_for_each_picture_of_a_batch(patch):
    masks = torch.zeros(2, 8, 12)
    masks[0, :, :6] = 1
    masks[1, :, 6:] = 1
    both = sample(patch(mask=masks), batch=2, cfg=2.0)
    for i in range(2):
        assert error(both[i : i + 1], sample(patch(mask=masks[i]), cfg=2.0)) < 1e-4


def test_odd_sizes_are_padded_as_comfyui_does(model, patch):
    noise = torch.randn(1, 16, 7, 9, generator=torch.Generator().manual_seed(0))
    euler = comfy.samplers.sampler_object("euler")

    def odd(on, **settings):
        return comfy.sample.sample_custom(
            on, noise, 1.0, euler, SIGMAS, conditioning(), [], torch.zeros_like(noise), disable_pbar=True
        )

    everywhere = odd(patch(mask=torch.ones(1, 20, 20)))
    assert error(everywhere, odd(patch())) < 1e-5
    assert error(everywhere, odd(model)) > 1e-3


def sample_area(on, area: tuple[int, int, int, int], **settings) -> torch.Tensor:
    """Sampled for a prompt for an area alone: height, width, top and left in latents."""
    prompts = [[cond, {**extra, "area": area, "strength": 1.0}] for cond, extra in conditioning()]
    noise = to_latents(recorded.run_settings()["latents"])
    euler = comfy.samplers.sampler_object("euler")
    return comfy.sample.sample_custom(
        on, noise, 1.0, euler, SIGMAS, prompts, prompts, noise * 0, disable_pbar=True, **settings
    )


def test_a_mask_goes_with_a_prompt_for_an_area(model, patch):
    """Conditioning Set Area, or Set Mask with "mask bounds": FLUX then gets a part of the latents."""
    area = (4, 6, 2, 4)
    plain, everywhere = sample_area(model, area), sample_area(patch(), area)
    inside, half = torch.zeros(1, 8, 12), torch.zeros(1, 8, 12)
    inside[:, 2:6, 4:10] = 1
    half[:, 2:6, 4:7] = 1
    assert error(sample_area(patch(mask=torch.ones(1, 20, 30)), area), everywhere) < 1e-5
    assert error(sample_area(patch(mask=inside), area), everywhere) < 1e-5
    assert torch.equal(sample_area(patch(mask=1 - inside), area), plain)
    in_half = sample_area(patch(mask=half), area)
    assert error(in_half, plain) > 1e-3
    assert error(in_half, everywhere) > 1e-3


def test_reference_latents_of_kontext_are_not_changed(model, patch):
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
    for on in (model.clone(), patch()):
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
    theirs = generate(reference, subject_image=character)
    before = apply(styled, CharacterConditioning(adapter, character, 0.9))
    after, _ = comfy.sd.load_lora_for_models(
        apply(model, CharacterConditioning(adapter, character, 0.9)), None, lora, 0.8, 0.0
    )
    assert error(sample(before), theirs) < 1e-5
    assert error(sample(after), theirs) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("before", [False, True])
def test_a_compute_dtype_may_be_set_before_and_after_the_character(
    model, adapter, character, dtype, before, monkeypatch
):
    """The node Model Compute Dtype."""
    folded: list[torch.dtype] = []
    monkeypatch.setattr(hosting, "fold", lambda *args, **settings: folded.append(args[2]) or fold(*args, **settings))
    on = model.clone()
    if before:
        on.set_model_compute_dtype(dtype)
    on = apply(on, CharacterConditioning(adapter, character, 0.9))
    if not before:
        on.set_model_compute_dtype(dtype)
    whole, rounded = sample(apply(model, CharacterConditioning(adapter, character, 0.9))), model.clone()
    rounded.set_model_compute_dtype(dtype)
    rounding = error(sample(rounded), sample(model))
    for _ in range(2):
        assert error(sample(on), whole) < 1.5 * rounding
        assert error(sample(on), sample(rounded)) > 1e-3
    assert set(folded) == {dtype, torch.float32}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_flux_stored_in_fp8_or_bf16_applies_the_character(adapter, character, reference, dtype):
    """As Load Diffusion Model's weight_dtype does it: stored in fp8 or bf16, computed here in float32."""
    state = {key: weight.to(dtype) for key, weight in recorded.transformer().state_dict().items()}
    copy = {key: weight.clone() for key, weight in state.items()}  # ComfyUI changes what it is given
    stored = comfy.sd.load_diffusion_model_state_dict(copy, model_options={"dtype": dtype})
    assert next(stored.model.diffusion_model.parameters()).dtype == dtype
    stored.set_model_compute_dtype(torch.float32)
    reference.remove_character_adapter()
    reference.transformer.load_state_dict({key: weight.float() for key, weight in state.items()})
    reference.set_character_adapter(recorded.adapter(), "cpu")
    theirs = generate(reference, subject_image=character)
    ours = sample(apply(stored, CharacterConditioning(adapter, character, 0.9)))
    assert error(ours, theirs) < 1e-5


def test_flux_query_scale_includes_patches_on_its_norm(model, adapter, character, monkeypatch):
    """A patch on FLUX's query norm does not disturb the character, which has a norm of its own."""
    plain, changed = ({}, {"diffusion_model.double_blocks.0.img_attn.norm.query_norm.weight": (torch.ones(128),)})
    key_scales, scales = SamplingState.key_scales, {}
    for name, patches in (("plain", plain), ("changed", changed)):
        patched = apply(model, CharacterConditioning(adapter, character, 0.9))
        patched.add_patches(patches, 0.5)

        def save(state, flux, adapter, name=name):
            scales[name] = key_scales(state, flux, adapter)
            return scales[name]

        monkeypatch.setattr(SamplingState, "key_scales", save)
        sample(patched, sigmas=SIGMAS[-2:])
    assert not torch.equal(scales["plain"][0], scales["changed"][0])
    assert torch.equal(scales["plain"][1], scales["changed"][1])


def test_original_model_stays_as_it_was(model, patch):
    before = sample(model)
    sample(patch())
    assert torch.equal(sample(model), before)
    assert not model.get_attachment(KEY)


def test_clones_of_a_patched_model_generate_the_same(patch):
    patched = patch()
    assert torch.equal(sample(patched.clone()), sample(patched))


# Once


@pytest.fixture
def resampled(adapter, monkeypatch) -> list[float]:
    """The timesteps at which the resampler runs."""
    timesteps: list[float] = []
    resample = adapter.adapter.projector.resample

    def counting(fused, timestep, folded=False):
        timesteps.extend(timestep.tolist())
        return resample(fused, timestep, folded)

    monkeypatch.setattr(adapter.adapter.projector, "resample", counting)
    return timesteps


def test_tokens_are_resampled_at_each_calls_own_timestep(patch, resampled):
    sample(patch(), "heun", batch=2)
    between = [timestep for timestep in resampled if timestep not in (SIGMAS * 1000).tolist()]
    assert not between
    assert len(resampled) == 7
    resampled.clear()
    sample(patch(), "dpm_2")
    between = [timestep for timestep in resampled if timestep not in (SIGMAS * 1000).tolist()]
    assert len(resampled) == 7
    assert len(between) == 3


def test_a_character_applied_twice_is_resampled_once_a_call(model, adapter, character, resampled):
    twice = model
    for window in ({"end": 0.4}, {"start": 0.6}):
        twice = apply(twice, CharacterConditioning(adapter, character, 0.9, **window))
    sample(twice)
    assert resampled == (SIGMAS[:-1] * 1000).tolist()


def test_a_window_that_the_schedule_does_not_reach_costs_nothing(model, patch, resampled):
    sigmas = torch.tensor([0.5, 0.25, 0.0])
    expected = sample(model, sigmas=sigmas)
    resampled.clear()
    assert torch.equal(sample(patch(end=0.3), sigmas=sigmas), expected)
    assert not resampled


@pytest.mark.parametrize("changes", [{}, {"start": 0.2, "end": 0.8}, {"scale": Strength(1.2, 0.9, 0.6, 0.8, 1.1)}])
def test_no_call_of_flux_but_the_first_waits_for_the_gpu(patch, changes):
    gpu, waits = PretendedCuda.current if torch.cuda.is_available() else None, []

    def counting(executor, *args, **kwargs):
        before = len(gpu.waits) if gpu else 0
        out = executor(*args, **kwargs)
        waits.append((len(gpu.waits) if gpu else 0) - before)
        return out

    patched = patch(**changes)
    wrappers = patched.wrappers[WrappersMP.DIFFUSION_MODEL]
    patched.wrappers[WrappersMP.DIFFUSION_MODEL] = {"counting": [counting], **wrappers}
    sample(patched, "dpm_2")
    assert len(waits) == 7
    assert not any(waits[1:])


@pytest.mark.parametrize("room", [0, 1e9])
def test_weights_are_on_the_device_while_sampling_alone(patch, adapter, room, monkeypatch):
    monkeypatch.setattr(sampling_state, "free_memory_beside", lambda *_: room)
    device = comfy.model_management.get_torch_device()
    attention = adapter.attention(device, torch.float32)
    resampler = adapter.adapter.projector.resampler
    with attention.on_device(room):
        first, second = attention.load(0), attention.load(1)
        assert {weight.device for weight in (*first.parameters(), *second.parameters())} == {device}
    during = []
    sample(patch(), callback=lambda *_: during.append(resampler.latents.device))
    assert during == [device] * 4
    assert {weight.device for module in (resampler, first, second) for weight in module.parameters()} == {CPU}


def test_weights_that_come_block_by_block_compute_what_resident_ones_do(patch, monkeypatch):
    results = []
    for room in (0, 1e9):
        monkeypatch.setattr(sampling_state, "free_memory_beside", lambda *_, room=room: room)
        results.append(sample(patch()))
    assert torch.equal(*results)


def test_attention_is_folded_once_for_an_adapter(patch, adapter, monkeypatch):
    folded = []
    monkeypatch.setattr(hosting, "fold", lambda *args, **kwargs: folded.append(1) or fold(*args, **kwargs))
    for patched in (patch(), patch(scale=0.5)):
        sample(patched)
    assert len(folded) == 1


# Errors


def test_old_comfyui_is_refused(patch, monkeypatch):
    monkeypatch.setattr("comfyui_version.__version__", "0.16.4")
    with pytest.raises(RuntimeError, match=r"needs ComfyUI 0\.17 or newer, this is 0\.16\.4: update ComfyUI"):
        patch()


def test_other_models_are_refused(patch, model):
    model.model.diffusion_model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"this MODEL is Linear; InstantCharacter needs FLUX\.1"):
        patch()


@pytest.mark.parametrize(
    ("part", "name", "advice"),
    [
        ("double_stream_modulation_img", "FLUX.2", "made for FLUX.1"),
        ("distilled_guidance_layer", "Chroma", "made for FLUX.1"),
        ("qweight", "FLUX for Nunchaku", "take FLUX.1 dev, schnell, Krea or Kontext in GGUF"),
    ],
)
def test_other_kinds_of_flux_are_refused_by_name(patch, model, part, name, advice):
    """The error names the kind of FLUX, and the file to use instead."""
    holder = torch.nn.Module()
    setattr(holder, part, torch.nn.Linear(1, 1))
    model.model.diffusion_model.other = holder
    with pytest.raises(ValueError, match=rf"this MODEL is {name}.*{advice}"):
        patch()


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
        apply(other, CharacterConditioning(adapter, character, 0.9))


def test_another_adapters_character_is_refused(patch, character):
    character.fingerprint = "0" * 32
    with pytest.raises(ValueError, match="made by adapter 0000"):
        patch()


@pytest.mark.parametrize("window", [{"start": 0.6, "end": 0.4}, {"end": 1.1}, {"start": float("nan")}])
def test_wrong_window_is_refused(patch, window):
    with pytest.raises(ValueError, match="0 ≤ start ≤ end ≤ 1"):
        patch(**window)


def test_empty_mask_is_refused(patch):
    with pytest.raises(ValueError, match="mask is empty"):
        patch(mask=torch.zeros(1, 8, 8))


def left_out(patched, blocks: list[int]):
    """The MODEL with these double blocks of FLUX left out by another node."""
    for i in blocks:
        patched.set_model_patch_replace(
            lambda args, _: {"img": args["img"], "txt": args["txt"]}, "dit", "double_block", i
        )
    return patched


def test_patches_that_flux_does_not_call_are_an_error_after_the_first_step(patch):
    patched, steps = patch(), []
    patched.model_options["transformer_options"]["patches"].clear()
    with pytest.raises(RuntimeError, match="only 0 of its 4 blocks called.*EasyCache and LazyCache work"):
        sample(patched, callback=lambda step, *_: steps.append(step))
    assert not steps


def test_patches_of_a_later_start_are_checked_at_the_first_step_too(patch):
    patched, steps = patch(start=0.5), []
    patched.model_options["transformer_options"]["patches"].clear()
    with pytest.raises(RuntimeError, match="only 0 of its 4 blocks called"):
        sample(patched, callback=lambda step, *_: steps.append(step))
    assert not steps


def test_pictures_of_a_batch_at_different_timesteps_are_an_error(patch):
    def uneven(executor, latents, timestep, *args, **kwargs):
        return executor(
            latents, timestep * torch.linspace(1, 0.5, len(timestep), device=timestep.device), *args, **kwargs
        )

    patched = patch()
    wrappers = patched.wrappers[WrappersMP.DIFFUSION_MODEL]
    patched.wrappers[WrappersMP.DIFFUSION_MODEL] = {"uneven": [uneven], **wrappers}
    with pytest.raises(ValueError, match="pictures of a batch are at different timesteps; sample them apart"):
        sample(patched, batch=2)


def test_a_few_blocks_that_are_left_out_are_a_warning(patch, caplog):
    sample(left_out(patch(), [0]))
    assert "leaves out 1 of FLUX's 4 blocks" in caplog.text


def test_most_blocks_left_out_are_an_error(patch, monkeypatch):
    monkeypatch.setattr(StepState, "add", lambda step, *_: step.blocks_called.add(0))
    with pytest.raises(RuntimeError, match="only 1 of its 4 blocks called"):
        sample(patch())


@pytest.mark.parametrize("node", ["EasyCacheNode", "LazyCacheNode"])
@pytest.mark.parametrize("after", [False, True])
def test_comfyuis_caches_work_before_and_after_apply(model, patch, adapter, character, node, after):
    from comfy_extras import nodes_easycache

    sigmas = torch.linspace(1, 0, 13)

    def cached(on):
        return getattr(nodes_easycache, node).execute(on, 5.0, 0.15, 0.95, False).args[0]

    both = cached(patch()) if after else apply(cached(model), CharacterConditioning(adapter, character, 0.9))
    calls = []
    flux = model.model.diffusion_model
    handle = flux.double_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    ours = sample(both, sigmas=sigmas)
    handle.remove()
    assert len(calls) < 12
    assert error(ours, sample(cached(model), sigmas=sigmas)) > 1e-3


def test_sampler_that_goes_around_comfyui_is_an_error(patch):
    patched = patch()
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


def test_masks_that_do_not_fit_the_batch_are_refused(patch):
    with pytest.raises(ValueError, match="2 masks on Apply for a batch of 3"):
        sample(patch(mask=torch.ones(2, 8, 8)), batch=3)


def test_mask_with_latents_of_a_tile_is_refused(patch):
    """As nodes do that sample a picture in tiles."""

    def in_tiles(executor, latents, *args, **kwargs):
        return executor(latents[..., :4], *args, **kwargs).repeat(1, 1, 1, 3)

    patched = patch(mask=torch.ones(1, 8, 8))
    wrappers = patched.wrappers[WrappersMP.DIFFUSION_MODEL]
    patched.wrappers[WrappersMP.DIFFUSION_MODEL] = {"tiles": [in_tiles], **wrappers}
    with pytest.raises(ValueError, match="needs latents of the whole picture"):
        sample(patched)


def test_cancelled_sampling_leaves_the_model_unchanged(patch, model):
    plain = sample(model)
    patched = patch()

    def cancel(step, *_):
        comfy.model_management.interrupt_current_processing()
        comfy.model_management.throw_exception_if_processing_interrupted()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(patched, callback=cancel)
    assert torch.equal(sample(model), plain)
    whole = sample(patched)
    assert error(whole, plain) > 1e-3
