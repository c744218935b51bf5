from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from support import training_world as world
from support.training_world import equal, weights

from instantcharacter import CharacterAdapter
from instantcharacter.training import Preview, launch, train, trainer
from instantcharacter.training.data import cache
from instantcharacter.training.data.examples import Examples
from instantcharacter.training.flow import zero_values
from instantcharacter.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "instantcharacter")


class Stop(Exception):
    """Ends a training from its ``on_step``."""


def first_loss(config, examples_config=None) -> float:
    """The loss of a training's first step, from fixed weights."""
    losses = []

    def on_step(step, loss):
        losses.append(loss.item())
        raise Stop

    torch.manual_seed(0)
    flux, adapter = world.new_flux(config), CharacterAdapter(config.sizes)
    examples = Examples(examples_config or config, torch.device("cpu"))
    training = Trainer(config, Accelerator(), flux, adapter, examples, on_step)
    with pytest.raises(Stop):
        training.run()
    return losses[0]


def test_only_the_adapter_is_trained(config):
    before, transformer = world.new_flux(config), world.new_flux(config)
    adapter = zero_values(CharacterAdapter(config.sizes))
    fresh = {key: weight.clone() for key, weight in adapter.state_dict().items()}
    accelerator = Accelerator(log_with="tensorboard", project_dir=config.output)
    Trainer(config, accelerator, transformer, adapter, Examples(config, accelerator.device)).run()
    trained = adapter.state_dict()
    assert all(not torch.equal(fresh[key], trained[key]) for key in fresh)
    assert equal(before.state_dict(), {k: v for k, v in transformer.state_dict().items() if ".processor." not in k})


def test_training_lowers_the_loss(config):
    train(replace(config, steps=30, log_every=10, drop_character=0.0, drop_text=0.0))
    losses = world.scalars(config.output)["loss"]
    assert losses[-1] < 0.8 * losses[0]


def test_each_step_is_reported_with_its_loss(config):
    reports = []
    train(replace(config, log_every=1), on_step=lambda step, loss: reports.append((step, loss.item())))
    assert [step for step, _ in reports] == [1, 2, 3, 4]
    assert world.scalars(config.output)["loss"] == pytest.approx([loss for _, loss in reports])


def test_resumed_equals_uninterrupted_bit_for_bit(config, tmp_path):
    config = replace(config, ema=0.9, warmup=3)
    whole = train(replace(config, output=tmp_path / "whole"))
    train(replace(config, output=tmp_path / "parts", steps=2))
    parts = train(replace(config, output=tmp_path / "parts"))
    assert equal(weights(whole), weights(parts))


def test_a_state_of_version_0_1_is_resumed(config, tmp_path):
    """It has no initial learning rates, and names the attention one level deeper."""
    config = replace(config, warmup=3)
    whole = train(replace(config, output=tmp_path / "whole"))
    train(replace(config, output=tmp_path / "parts", steps=2))
    state = torch.load(tmp_path / "parts/state.pt")
    moments = state["optimizer"]
    for group in moments["param_groups"]:
        del group["initial_lr"]
        group["params"] = [deeper(name) for name in group["params"]]
    moments["state"] = {deeper(name): value for name, value in moments["state"].items()}
    state["weights"] = {deeper(name): weight for name, weight in state["weights"].items()}
    assert any("attention.attention" in name for name in state["weights"])
    torch.save(state, tmp_path / "parts/state.pt")
    assert equal(weights(whole), weights(train(replace(config, output=tmp_path / "parts"))))


def deeper(name: str) -> str:
    return name.replace(".processor.attention.", ".processor.attention.attention.")


def test_an_interrupted_training_saves_after_its_step_and_resumes(config, tmp_path):
    def interrupt(step, loss):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = train(replace(config, output=tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train(config, on_step=interrupt)
    assert torch.load(config.output / "state.pt")["step"] == 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert equal(weights(whole), weights(train(config)))


def test_a_second_signal_ends_a_step_that_hangs(config):
    def hang(step, loss):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        pytest.fail("the step went on")

    with pytest.raises(KeyboardInterrupt):
        train(config, on_step=hang)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_pictures_that_hang_do_not_delay_the_end(config, monkeypatch):
    released, requested = threading.Event(), threading.Event()
    open_path = Path.open

    def hanging(path, *arguments, **settings):
        if path.suffix == ".png":
            requested.set()
            assert released.wait(60)
        return open_path(path, *arguments, **settings)

    def interrupt():
        requested.wait()
        for _ in range(2):
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Path, "open", hanging)
    threading.Thread(target=interrupt).start()
    begin = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config)
        assert time.monotonic() - begin < 30
    finally:
        released.set()


def test_a_training_runs_outside_the_main_thread(config):
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(train, config).result().is_file()


def test_a_date_is_a_seed(config):
    assert train(replace(config, steps=1, seed=20260101)).is_file()
    assert train(replace(config, steps=1, seed=2**64 - 1, output=config.output / "largest")).is_file()


def test_other_seeds_give_other_noise(config):
    seeds = (0, 1, 20260101, 20260101 % 2**24)
    seeded = [replace(config, seed=seed, drop_character=0.0, drop_text=0.0) for seed in seeds]
    losses = {first_loss(one, examples_config=config) for one in seeded}
    assert len(losses) == len(seeds)


def test_a_dropped_character_has_no_influence(config):
    """With every character dropped, another reference changes nothing."""
    losses = []
    for pairs in (True, False):
        data = (replace(config.data[0], pairs=pairs),)
        losses.append(first_loss(replace(config, data=data, drop_character=0.999999, drop_text=0.0)))
    assert losses[0] == losses[1]


def test_a_state_that_cannot_be_written_leaves_the_former_one(config, monkeypatch):
    train(replace(config, steps=2))
    before = (config.output / "state.pt").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        train(config)
    assert (config.output / "state.pt").read_bytes() == before


def test_every_saved_state_comes_with_an_adapter_that_loads(config):
    saved = []

    def read(step=3, loss=None):
        if step == 3:  # the first state is that of step 2
            saved.append(CharacterAdapter.from_file(config.output / "adapter.safetensors").state_dict())

    train(replace(config, ema=0.9), on_step=read)
    read()
    assert len(saved) == 2
    assert not equal(*saved)


@pytest.mark.parametrize("where", ["the loss", "the gradient"])
@pytest.mark.parametrize("log_every", [1, 100])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_training_that_diverges_stops_with_its_last_good_states(config, monkeypatch, where, log_every, bad):
    """At its third step; the second has a state."""
    train(replace(config, steps=2))
    before = {path.name: path.read_bytes() for path in config.output.iterdir() if path.is_file()}
    real = trainer.velocity_losses

    def diverging(*tensors):
        losses = real(*tensors)
        if where == "the loss":
            return losses * bad
        losses.register_hook(lambda gradient: gradient * bad)
        return losses

    monkeypatch.setattr(trainer, "velocity_losses", diverging)
    with pytest.raises(ValueError, match="not finite at step .* Lower learning_rate"):
        train(replace(config, log_every=log_every))
    assert before == {path.name: path.read_bytes() for path in config.output.iterdir() if path.is_file()}
    monkeypatch.undo()
    assert all(weight.isfinite().all() for weight in weights(train(config)).values())


def test_a_state_of_other_sizes_is_refused(config):
    train(config)
    with pytest.raises(ValueError, match=r"state.pt is of an adapter of other sizes"):
        train(replace(config, sizes=replace(config.sizes, num_tokens=4)))


def test_too_little_memory_says_what_to_do(config):
    def full(step, loss):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(RuntimeError, match="try optimizer adamw8bit") as raised:
        train(config, on_step=full)
    assert "out of memory" not in str(raised.value)  # the command line adds --vram to such messages


def test_a_filled_cache_is_enough_for_dropped_conditions(config, monkeypatch):
    for name in ("AutoencoderKL", "FluxPipeline", "CharacterEncoder"):
        monkeypatch.setattr(f"instantcharacter.training.data.frozen_models.{name}", None)
    train(replace(config, drop_text=0.5, drop_character=0.5))


def test_the_cache_changes_nothing(config):
    live, cached = (train(replace(config, output=config.output / str(c), cache=c)) for c in (None, config.cache))
    for first, second in zip(weights(live).values(), weights(cached).values()):
        torch.testing.assert_close(first, second, atol=1e-3, rtol=1e-3)


@pytest.fixture
def files_read(monkeypatch) -> list[Path]:
    """The cache files that are read."""
    files, read = [], cache.read_safetensors
    monkeypatch.setattr(cache, "read_safetensors", lambda file, expected: (files.append(file), read(file, expected))[1])
    return files


def test_files_in_memory_are_read_once(config, files_read):
    whole = train(replace(config, output=config.output / "read", steps=9))
    files_read.clear()
    cached = train(replace(config, output=config.output / "held", steps=9, held_gib=1.0))
    assert equal(weights(whole), weights(cached))
    assert len(files_read) < 40  # 18 samples and more that are read ahead, of three files each, would be 54 and more


def test_a_memory_cache_on_the_device_changes_nothing(config):
    host, device = (
        train(replace(config, output=config.output / place, steps=6, held_gib=1.0, held_in=place))
        for place in ("host", "device")
    )
    assert equal(weights(host), weights(device))


def test_stages_follow_each_other_with_one_memory_cache(config, files_read):
    first = replace(config, output=config.output / "first", held_gib=1.0)
    alone = train(replace(first, output=config.output / "alone", adapter=train(first)))
    files_read.clear()
    again = replace(first, output=config.output / "again")
    second = replace(first, output=config.output / "second", adapter=again.output / "adapter.safetensors")
    together = train(again, second)
    assert together == second.output / "adapter.safetensors"
    assert equal(weights(alone), weights(together))
    assert len(files_read) < 3 * (world.PICTURES + 2) + 12  # each file once, and what was read before it was stored


def test_a_stage_s_models_are_freed_before_the_next_stage_s_are_loaded(config, monkeypatch):
    alive, references = [], []

    def noting(make):
        def made(*args, **kwargs):
            result = make(*args, **kwargs)
            references.append(weakref.ref(result))
            return result

        return made

    def loading(*args, **kwargs):
        alive.extend(reference for reference in references if reference() is not None)
        return noting(load)(*args, **kwargs)

    load = launch.FluxTransformer2DModel.from_pretrained
    monkeypatch.setattr(launch.FluxTransformer2DModel, "from_pretrained", loading)
    for name in ("Examples", "Trainer", "CharacterAdapter"):
        monkeypatch.setattr(launch, name, noting(getattr(launch, name)))
    gc.disable()  # a collection by chance would hide a reference cycle
    try:
        train(*(replace(config, output=config.output / name, steps=1) for name in "ab"))
    finally:
        gc.enable()
    assert len(references) == 8 and not alive


def test_settings_that_exclude_a_cuda_graph_are_refused(config, monkeypatch):
    with pytest.raises(ValueError, match="checkpointing"):
        replace(config, cuda_graph=True, checkpointing=True)
    with pytest.raises(ValueError, match="accumulate"):
        replace(config, cuda_graph=True, checkpointing=False, accumulate=2)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(ValueError, match="one process"):
        train(replace(config, cuda_graph=True, checkpointing=False))


def test_losses_by_noise_level_and_previews_are_logged(config, models):
    reference = str(models / "pictures/0_reference.png")
    previews = (Preview(reference, "a picture of a character waving on a beach"),)
    train(replace(config, previews=previews, preview_every=2, preview_steps=2))
    logged, events = world.scalars(config.output), world.events(config.output)
    assert len(logged["loss"]) == 2
    assert any(tag.startswith(("loss_at_σ", "loss at σ")) for tag in logged), logged.keys()
    assert len(events.Images(events.Tags()["images"][0])) == 2


def test_the_average_lags_behind_the_weights(config, tmp_path):
    last, averaged = (weights(train(replace(config, output=tmp_path / str(ema), ema=ema))) for ema in (0.0, 0.9))
    state = torch.load(tmp_path / "0.9/state.pt")
    assert not equal(last, averaged)
    assert len(state["average"]) == len(state["weights"]) == len(last)


@pytest.mark.slow
def test_the_command_line_trains_and_converts(config, models, tmp_path):
    import yaml

    settings = {
        "output": str(tmp_path / "made"),
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
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(settings))
    run(*COMMAND, "train", str(tmp_path / "stage.yaml"))
    trained = tmp_path / "made/adapter.safetensors"
    run(*COMMAND, "convert", str(trained), "--output", str(tmp_path / "adapter.bin"))
    released = torch.load(tmp_path / "adapter.bin", weights_only=True)
    assert set(released) == {"image_proj", "ip_adapter"}
    projector = CharacterAdapter.from_file(trained).projector.state_dict()
    assert all(torch.equal(released["image_proj"][key], projector[key]) for key in projector)


@pytest.mark.slow
def test_two_processes_share_the_samples_and_resume_where_a_signal_to_one_stopped_both(config, tmp_path):
    def two(*stages, stop=None):
        pickled = tmp_path / "config.pickle"
        pickled.write_bytes(pickle.dumps(([replace(stage, batch_size=1) for stage in stages], stop)))
        run(*launcher, str(tmp_path / "two.py"), str(pickled), environment=environment)

    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    parts = replace(config, output=tmp_path / "parts", save_every=100)
    two(parts, stop=3)
    state = torch.load(tmp_path / "parts/state.pt")
    assert (state["step"], state["positions"]) == (3, [5, 6])
    two(parts, replace(config, output=tmp_path / "whole"))  # one stage after the other
    assert torch.load(tmp_path / "whole/state.pt")["positions"] == [7, 8]
    assert equal(weights(tmp_path / "whole/adapter.safetensors"), weights(tmp_path / "parts/adapter.safetensors"))


TWO_PROCESSES = """
import os, pickle, signal, sys
from pathlib import Path
from instantcharacter.training import train

signal.alarm(100)  # processes that hang would outlive the test
stages, stop = pickle.loads(Path(sys.argv[1]).read_bytes())

def interrupt(step, loss):
    if step == stop and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)

try:
    train(*stages, on_step=interrupt)
except KeyboardInterrupt:
    sys.exit(stop is None)
sys.exit(stop is not None)
"""


def run(*arguments, environment=None):
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
