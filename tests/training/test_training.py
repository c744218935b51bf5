from __future__ import annotations

import gc
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_world as world
from accelerate import Accelerator
from diffusers import FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from instantcharacter import CharacterAdapter, InstantCharacterPipeline
from instantcharacter.training import Preview, examples, prepare, train, trainer
from instantcharacter.training.examples import Examples
from instantcharacter.training.flow import CharacterFlow, new_adapter
from instantcharacter.training.objective import add_noise, draw_sigmas, positions, velocity_losses

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "instantcharacter")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    world.save_models(folder)
    world.save_pictures(folder / "pictures")
    prepare(world.config(folder, folder / "unused"), samples=world.PICTURES)
    return folder


@pytest.fixture
def config(models, tmp_path):
    return world.config(models, tmp_path / "output")


def weights(path):
    return load_file(path)


def same(first, second):
    return all(torch.equal(first[key], second[key]) for key in first)


def scalars(folder):
    events = EventAccumulator(str(next(folder.rglob("events.*")).parent))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}, events


def test_noise_levels_are_logit_normal_and_shifted_as_flux_is():
    for tokens, shift in ((256, 0.5), (4096, 1.15)):
        sigmas = draw_sigmas(100_000, tokens, torch.Generator().manual_seed(0))
        logits = torch.logit(sigmas.double())
        assert logits.mean().item() == pytest.approx(shift, abs=0.02)
        assert logits.std().item() == pytest.approx(1, abs=0.02)


def test_velocity_takes_noise_back_to_the_picture():
    latents, noise = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0)).unbind()
    sigmas = torch.tensor([0.0, 0.3, 1.0])
    noisy = add_noise(latents, noise, sigmas)
    assert torch.equal(noisy[0], latents[0]) and torch.equal(noisy[2], noise[2])
    velocity = noise - latents
    torch.testing.assert_close(noisy - sigmas[:, None, None] * velocity, latents)
    assert velocity_losses(velocity, latents, noise).tolist() == [0, 0, 0]
    assert velocity_losses(velocity + 2, latents, noise).tolist() == pytest.approx([4, 4, 4])


def test_only_the_adapter_learns(config):
    before = FluxTransformer2DModel.from_pretrained(config.model, subfolder="transformer")
    transformer = FluxTransformer2DModel.from_pretrained(config.model, subfolder="transformer")
    adapter = new_adapter(CharacterAdapter(config.sizes))
    fresh = {key: weight.clone() for key, weight in adapter.state_dict().items()}
    accelerator = Accelerator(log_with="tensorboard", project_dir=config.output)
    examples = Examples(config, accelerator.device)
    trainer.Trainer(config, accelerator, transformer, adapter, examples).run()
    learned = adapter.state_dict()
    assert all(not torch.equal(fresh[key], learned[key]) for key in fresh)
    assert same(before.state_dict(), {k: v for k, v in transformer.state_dict().items() if ".processor." not in k})


def test_what_is_learned_makes_the_pictures_likelier(config):
    train(replace(config, steps=30, log_every=10, drop_character=0.0, drop_text=0.0))
    losses, _ = scalars(config.output)
    assert losses["loss"][-1] < 0.8 * losses["loss"][0]


def test_a_new_adapter_leaves_flux_as_it_is(config):
    transformer = FluxTransformer2DModel.from_pretrained(config.model, subfolder="transformer")
    inputs = torch.randn(1, 16, 32), torch.tensor([0.5]), torch.randn(1, 32, 96), torch.randn(1, 96)
    places = positions(torch.empty(1, 16, 8, 8))
    noisy, sigmas, prompts, pooled = inputs
    plain = transformer(
        hidden_states=noisy,
        timestep=sigmas,
        guidance=torch.ones(1),
        encoder_hidden_states=prompts,
        pooled_projections=pooled,
        txt_ids=torch.zeros(32, 3),
        img_ids=places,
    ).sample
    flow = CharacterFlow(transformer, new_adapter(CharacterAdapter(config.sizes)), checkpointing=False)
    features = torch.randn(1, 12, 96), torch.randn(1, 4, 96), torch.randn(1, 16, 96)
    torch.testing.assert_close(flow(noisy, sigmas, torch.ones(1), prompts, pooled, features, places), plain)


def test_checkpointing_gives_the_same_gradients(config):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel.from_pretrained(config.model, subfolder="transformer")
        flow = CharacterFlow(transformer, CharacterAdapter(config.sizes), checkpointing)
        features = torch.randn(2, 12, 96), torch.randn(2, 4, 96), torch.randn(2, 16, 96)
        noisy, places = torch.randn(2, 16, 32), positions(torch.empty(1, 16, 8, 8))
        sigmas = torch.tensor([0.2, 0.9])
        flow(
            noisy, sigmas, torch.ones(2), torch.randn(2, 32, 96), torch.randn(2, 96), features, places
        ).square().mean().backward()
        gradients.append([parameter.grad for parameter in flow.parameters() if parameter.requires_grad])
    assert gradients[0]
    for kept, again in zip(*gradients):
        assert kept.abs().max() > 0
        torch.testing.assert_close(kept, again)


def test_what_was_learned_draws_in_the_pipeline(config, models):
    """The trainer's forward is the pipeline's: what one learns the other draws."""
    path = train(config)
    pipeline = InstantCharacterPipeline.from_pretrained(str(models / "flux"))
    pipeline.set_progress_bar_config(disable=True)
    adapter = CharacterAdapter.from_file(path)
    assert adapter.config == world.SIZES
    pipeline.set_character_adapter(adapter)
    examples = Examples(config, torch.device("cpu"))
    batch, _ = next(examples.batches(0))
    noisy, sigma, place = batch.latents[:1], torch.tensor([0.6]), positions(torch.empty(1, 16, 8, 8))
    transformer = FluxTransformer2DModel.from_pretrained(config.model, subfolder="transformer")
    flow = CharacterFlow(transformer, CharacterAdapter.from_file(path), checkpointing=False)
    features = tuple(part[:1] for part in batch.features)
    learned = flow(noisy, sigma, torch.tensor([3.5]), batch.prompts[:1], batch.pooled[:1], features, place)
    fused = adapter.projector.fuse(*features)
    tokens = adapter.projector.resample(fused, 1000 * sigma, folded=True)
    from instantcharacter.model.conditioning import Subject

    drawn = pipeline.transformer(
        hidden_states=noisy,
        timestep=sigma,
        guidance=torch.tensor([3.5]),
        encoder_hidden_states=batch.prompts[:1],
        pooled_projections=batch.pooled[:1],
        txt_ids=torch.zeros(32, 3),
        img_ids=place,
        joint_attention_kwargs={"subjects": [Subject(tokens, torch.tensor(1.0))], "image_tokens": 16},
    ).sample
    torch.testing.assert_close(drawn, learned, atol=1e-4, rtol=1e-4)


def test_resumed_equals_uninterrupted_bit_for_bit(config, tmp_path):
    whole = train(replace(config, output=tmp_path / "whole", ema=0.9))
    train(replace(config, output=tmp_path / "parts", ema=0.9, steps=2))
    parts = train(replace(config, output=tmp_path / "parts", ema=0.9))
    assert same(weights(whole), weights(parts))


def test_an_interrupted_training_saves_after_its_step_and_goes_on(config, tmp_path, monkeypatch):
    whole = train(replace(config, output=tmp_path / "whole"))
    take_step = trainer.Trainer._take_step

    def interrupted(self, batches):
        take_step(self, batches)
        if self._step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer.Trainer, "_take_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert torch.load(config.output / "state.pt")["step"] == 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.undo()
    assert same(weights(whole), weights(train(config)))


def test_a_second_signal_ends_a_step_that_hangs(config, monkeypatch):
    def hanging(self, batches):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        pytest.fail("the step went on")

    monkeypatch.setattr(trainer.Trainer, "_take_step", hanging)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_pictures_that_cannot_be_read_do_not_hold_up_the_end(config, monkeypatch):
    released, asked = threading.Event(), threading.Event()

    def hanging(self, sample):
        asked.set()
        assert released.wait(60)

    def interrupt():
        asked.wait()
        for _ in range(2):
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Examples, "_begin", hanging)
    threading.Thread(target=interrupt).start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config)
        assert time.monotonic() - began < 30
    finally:
        released.set()


def test_a_training_runs_outside_the_main_thread(config):
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(train, config).result().is_file()


def test_a_date_is_a_seed(config):
    assert train(replace(config, steps=1, seed=20260101)).is_file()
    assert train(replace(config, steps=1, seed=2**64 - 1, output=config.output / "largest")).is_file()


def test_other_seeds_draw_other_noise(config):
    accelerator, losses = Accelerator(), {}
    for seed in (0, 1, 20260101, 20260101 % 2**24):
        seeded = replace(config, seed=seed, drop_character=0.0, drop_text=0.0)
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel.from_pretrained(config.model, subfolder="transformer")
        training = trainer.Trainer(
            seeded, accelerator, transformer, CharacterAdapter(config.sizes), Examples(seeded, accelerator.device)
        )
        batch, _ = next(Examples(config, accelerator.device).batches(0))
        losses[seed] = training._loss(batch, 0).item()
    assert len(set(losses.values())) == len(losses)


def test_a_state_that_cannot_be_written_leaves_the_one_before(config, monkeypatch):
    train(replace(config, steps=2))
    before = (config.output / "state.pt").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        train(config)
    assert (config.output / "state.pt").read_bytes() == before


def test_every_saved_state_comes_with_an_adapter_that_loads(config, monkeypatch):
    saved = []
    save = trainer.Trainer._save
    monkeypatch.setattr(trainer.Trainer, "_save", lambda self: (save(self), saved.append(read())))

    def read():
        return CharacterAdapter.from_file(config.output / "adapter.safetensors").state_dict()

    train(replace(config, ema=0.9))
    assert len(saved) == 2
    assert not same(*saved)


def test_a_state_of_other_sizes_is_refused(config):
    train(config)
    with pytest.raises(ValueError, match=r"state.pt is of an adapter of other sizes"):
        train(replace(config, sizes=replace(config.sizes, num_tokens=4)))


def test_too_little_memory_says_what_to_do(config, monkeypatch):
    def full(self, batches):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(trainer.Trainer, "_take_step", full)
    with pytest.raises(RuntimeError, match="try optimizer adamw8bit") as raised:
        train(config)
    assert "out of memory" not in str(raised.value)  # or the command line would speak of --vram


def test_a_filled_cache_needs_none_of_the_models(config, models, monkeypatch):
    for name in ("AutoencoderKL", "FluxPipeline", "CharacterEncoder"):
        monkeypatch.setattr(f"instantcharacter.training.examples.{name}", None)
    train(replace(config, drop_text=0.5, drop_character=0.5))


def test_the_cache_changes_nothing(config):
    live, cached = (train(replace(config, output=config.output / str(c), cache=c)) for c in (None, config.cache))
    for one, other in zip(weights(live).values(), weights(cached).values()):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_what_was_kept_and_what_is_computed_come_together_on_the_device():
    kept, computed = torch.zeros(2), torch.zeros(2, device="meta")
    together = examples._together([{"tokens": kept}, {"tokens": computed}], torch.device("meta"))
    assert together["tokens"].shape == (2, 2) and together["tokens"].device.type == "meta"


def test_what_is_held_in_memory_is_read_once(config, monkeypatch):
    whole = train(replace(config, output=config.output / "read", steps=9))
    read, count = examples._kept, []
    monkeypatch.setattr(examples, "_kept", lambda file: (count.append(file), read(file))[1])
    held = train(replace(config, output=config.output / "held", steps=9, held_gib=1.0))
    assert same(weights(whole), weights(held))
    assert len(count) < 40  # 18 samples and more that are read ahead, of three files each, would be 54 and more
    little = Examples(replace(config, held_gib=1e-9), torch.device("cpu"))
    next(little.batches(0))
    assert not little._features._held.tensors


def test_what_is_held_on_the_device_is_the_same(config):
    host, device = (
        train(replace(config, output=config.output / place, steps=6, held_gib=1.0, held_in=place))
        for place in ("host", "device")
    )
    assert same(weights(host), weights(device))


def test_stages_follow_each_other_and_what_is_held_is_read_once(config, monkeypatch):
    first = replace(config, output=config.output / "first", held_gib=1.0)
    alone = train(replace(first, output=config.output / "alone", adapter=train(first)))
    read, count = examples._kept, []
    monkeypatch.setattr(examples, "_kept", lambda file: (count.append(file), read(file))[1])
    again = replace(first, output=config.output / "again")
    second = replace(first, output=config.output / "second", adapter=again.output / "adapter.safetensors")
    together = train(again, second)
    assert together == second.output / "adapter.safetensors"
    assert same(weights(alone), weights(together))
    assert len(count) < 3 * (world.PICTURES + 2) + 12  # each file once, and what was read before it was held


def test_what_is_held_is_for_the_same_models_and_settings_alone(config, monkeypatch):
    computed = []
    for name in ("_encode", "_read", "_look"):
        compute = getattr(Examples, name)

        def counted(self, parts, name=name, compute=compute):
            computed.extend([name] * len(parts))
            return compute(self, parts)

        monkeypatch.setattr(Examples, name, counted)
    monkeypatch.setattr(
        examples, "id", lambda _: 0, raising=False
    )  # as addresses may be, once their first owner is gone
    config = replace(config, cache=None, held_gib=1.0, batch_size=world.PICTURES)
    device = torch.device("cpu")
    held = examples.Held(config, device)
    first, _ = next(Examples(config, device, held=held).batches(0))
    assert Counter(computed) == {"_encode": 6, "_read": 6, "_look": 6}
    again, _ = next(Examples(replace(config), device, held=held).batches(0))
    assert Counter(computed) == {"_encode": 6, "_read": 6, "_look": 6}
    assert torch.equal(first.latents, again.latents)
    other, _ = next(Examples(replace(config, resolution=32), device, held=held).batches(0))
    assert Counter(computed) == {"_encode": 12, "_read": 6, "_look": 6}
    assert (first.latents.shape[1], other.latents.shape[1]) == (16, 4)


def test_a_stage_s_models_are_gone_before_the_next_one_s_are_there(config, monkeypatch):
    make, alive, models = trainer._trainer, [], []

    def making(config, accelerator, held):
        alive.extend(reference for reference in models if reference() is not None)
        made = make(config, accelerator, held)
        models.extend(map(weakref.ref, (made, made._module, made._module.transformer, made._examples)))
        return made

    monkeypatch.setattr(trainer, "_trainer", making)
    gc.disable()  # or they may go by chance
    try:
        train(*(replace(config, output=config.output / name, steps=1) for name in "ab"))
    finally:
        gc.enable()
    assert len(models) == 8 and not alive


def test_a_graph_of_what_cannot_be_recorded_is_refused(config, monkeypatch):
    with pytest.raises(ValueError, match="checkpointing"):
        replace(config, cuda_graph=True, checkpointing=True)
    with pytest.raises(ValueError, match="accumulate"):
        replace(config, cuda_graph=True, checkpointing=False, accumulate=2)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(ValueError, match="one process"):
        train(replace(config, cuda_graph=True, checkpointing=False))


def test_only_what_is_to_be_cached_is(config, tmp_path):
    cached = replace(config, cache=tmp_path / "cache", cached=("texts",))
    next(Examples(cached, torch.device("cpu")).batches(0))
    assert {folder.name.split("-")[0] for folder in cached.cache.iterdir()} == {"texts"}


def test_a_cut_off_file_in_the_cache_is_made_again(config, tmp_path):
    cached = replace(config, cache=tmp_path / "cache")
    first, _ = next(Examples(cached, torch.device("cpu")).batches(0))
    files = [*cached.cache.rglob("*.safetensors")]
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    again, _ = next(Examples(cached, torch.device("cpu")).batches(0))
    torch.testing.assert_close(again.latents, first.latents)
    assert all(file.stat().st_size > 100 for file in files)


def test_a_file_in_the_cache_that_cannot_be_read_is_made_again(config, tmp_path, monkeypatch):
    cached = replace(config, cache=tmp_path / "cache")
    first, _ = next(Examples(cached, torch.device("cpu")).batches(0))

    def refused(path, expected):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(examples, "read_safetensors", refused)
    examined = Examples(cached, torch.device("cpu"))
    again, _ = next(examined.batches(0))
    torch.testing.assert_close(again.latents, first.latents)
    assert not examined.tally.bad


@pytest.mark.parametrize(
    ("folder", "changed"),
    [
        ("flux/vae", "latents"),
        ("flux/text_encoder", "pooled"),
        ("flux/text_encoder_2", "prompts"),
        ("siglip", "features"),
        ("dinov2", "features"),
    ],
)
def test_a_model_trained_again_at_its_place_computes_again(config, models, tmp_path, folder, changed):
    shutil.copytree(models, tmp_path / "models", ignore=shutil.ignore_patterns("cache"))
    config = world.config(tmp_path / "models", config.output)
    before, _ = next(Examples(config, torch.device("cpu")).batches(0))
    file = next((tmp_path / "models" / folder).glob("*.safetensors"))
    times = file.stat()
    learned = {key: weight * 1.1 for key, weight in load_file(file).items()}
    save_file(learned, file, metadata={"format": "pt"})
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_size == times.st_size
    after, _ = next(Examples(config, torch.device("cpu")).batches(0))
    for name in ("latents", "pooled", "prompts", "features"):
        one, other = (torch.cat([*map(torch.flatten, getattr(batch, name))]) for batch in (before, after))
        assert torch.equal(one, other) == (name != changed)


def test_a_copy_of_the_models_needs_nothing_computed_again(config, models, tmp_path, monkeypatch):
    shutil.copytree(models, tmp_path / "models", ignore=shutil.ignore_patterns("cache"))
    config = replace(world.config(tmp_path / "models", config.output), cache=config.cache)
    for name in ("AutoencoderKL", "FluxPipeline", "CharacterEncoder"):
        monkeypatch.setattr(f"instantcharacter.training.examples.{name}", None)
    next(Examples(config, torch.device("cpu")).batches(0))


def test_other_preparation_has_another_cache(config, monkeypatch):
    def folders():
        made = Examples(config, torch.device("cpu"))
        return {made._latents._folder, made._texts._folder, made._features._folder}

    before = folders()
    assert folders() == before
    monkeypatch.setattr(examples, "PREPARATION", 2)
    assert not folders() & before


def test_a_change_to_what_models_are_given_of_a_picture_is_a_new_preparation(config):
    """If this fails, raise ``PREPARATION`` and put the new numbers here: caches that are filled no longer fit."""
    across = torch.arange(300).expand(200, 300) * 255 // 299
    down = torch.arange(200)[:, None].expand(200, 300) * 255 // 199
    picture = io.BytesIO()
    pixels = torch.stack([across, down, torch.full_like(down, 60)], dim=-1).to(torch.uint8).numpy()
    Image.fromarray(pixels).save(picture, "PNG")
    crop = Examples(config, torch.device("cpu"))._crop(picture.getvalue())
    seen = examples._squares(picture.getvalue()).float()
    assert examples.PREPARATION == 1
    assert crop.shape == (3, 64, 64)
    for (y, x), colour in {(0, 0): (-0.663, -0.992, -0.529), (20, 50): (0.380, -0.365, -0.529)}.items():
        assert crop[:, y, x].tolist() == pytest.approx(colour, abs=0.01)
    views = {(0, 10, 100): (255, 255, 255), (0, 192, 100): (66, 128, 60), (1, 200, 300): (99, 35, 60)}
    for (view, y, x), colour in {**views, (4, 50, 200): (194, 152, 60)}.items():
        assert seen[view, y, x].tolist() == pytest.approx(colour, abs=1)


def test_losses_are_told_by_noise_level_and_previews_drawn(config, models):
    reference = str(models / "pictures/0_reference.png")
    previews = (Preview(reference, "a picture of a character waving on a beach"),)
    train(replace(config, previews=previews, preview_every=2, preview_steps=2))
    told, events = scalars(config.output)
    assert len(told["loss"]) == 2
    assert any(tag.startswith("loss_at_σ") or tag.startswith("loss at σ") for tag in told), told.keys()
    assert len(events.Images(events.Tags()["images"][0])) == 2


def test_nobody_is_drawn_for_a_dropped_character(config):
    """With every character dropped, who is in the reference changes nothing."""
    accelerator = Accelerator()
    runs = []
    for pairs in (True, False):
        data = (replace(config.data[0], pairs=pairs),)
        dropped = replace(config, data=data, drop_character=0.999999, drop_text=0.0, output=config.output / str(pairs))
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel.from_pretrained(config.model, subfolder="transformer")
        adapter = CharacterAdapter(config.sizes)
        examples = Examples(dropped, accelerator.device)
        training = trainer.Trainer(dropped, accelerator, transformer, adapter, examples)
        batch, _ = next(examples.batches(0))
        runs.append(training._loss(batch, 0).item())
    assert runs[0] == runs[1]


def test_the_average_lags_behind_the_weights(config, tmp_path):
    last, averaged = (weights(train(replace(config, output=tmp_path / str(ema), ema=ema))) for ema in (0.0, 0.9))
    state = torch.load(tmp_path / "0.9/state.pt")
    assert not same(last, averaged)
    assert len(state["average"]) == len(state["weights"]) == len(last)


def test_the_8_bit_optimizer_says_what_it_needs(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        train(replace(config, optimizer="adamw8bit"))


def test_the_command_line_trains_and_converts(config, models, tmp_path):
    import yaml

    told = {
        "output": str(tmp_path / "told"),
        "data": [{"path": str(models / "pictures"), "pairs": True}],
        "model": config.model,
        "siglip": config.siglip,
        "dinov2": config.dinov2,
        "sizes": {name: getattr(world.SIZES, name) for name in world.SIZES.__dataclass_fields__},
        "resolution": 64,
        "steps": 1,
        "precision": "float32",
        "cache": str(config.cache),
    }
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(told))
    run(*COMMAND, "train", str(tmp_path / "stage.yaml"))
    made = tmp_path / "told/adapter.safetensors"
    run(*COMMAND, "convert", str(made), "--output", str(tmp_path / "adapter.bin"))
    released = torch.load(tmp_path / "adapter.bin", weights_only=True)
    assert set(released) == {"image_proj", "ip_adapter"}
    made = CharacterAdapter.from_file(made).projector.state_dict()
    assert all(torch.equal(released["image_proj"][key], made[key]) for key in made)


def test_two_processes_share_the_samples_and_go_on_where_a_signal_to_one_stopped_both(config, tmp_path):
    def two(*stages, stop=None):
        pickled = tmp_path / "config.pickle"
        pickled.write_bytes(pickle.dumps(([replace(stage, batch_size=1) for stage in stages], stop)))
        run(*launch, str(tmp_path / "two.py"), str(pickled), environment=environment)

    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    parts = replace(config, output=tmp_path / "parts", save_every=100)
    two(parts, stop=3)
    state = torch.load(tmp_path / "parts/state.pt")
    assert (state["step"], state["positions"]) == (3, [5, 6])
    two(parts, replace(config, output=tmp_path / "whole"))  # one stage after the other
    assert torch.load(tmp_path / "whole/state.pt")["positions"] == [7, 8]
    assert same(weights(tmp_path / "whole/adapter.safetensors"), weights(tmp_path / "parts/adapter.safetensors"))


TWO_PROCESSES = """
import os, pickle, signal, sys
from pathlib import Path
from instantcharacter.training import train, trainer

signal.alarm(100)  # processes that hang would outlive the test
stages, stop = pickle.loads(Path(sys.argv[1]).read_bytes())
take_step = trainer.Trainer._take_step

def interrupted(self, batches):
    take_step(self, batches)
    if self._step == stop and self._accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)

trainer.Trainer._take_step = interrupted
try:
    train(*stages)
except KeyboardInterrupt:
    sys.exit(stop is None)
sys.exit(stop is not None)
"""


def run(*arguments, environment=None):
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
