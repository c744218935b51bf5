"""The commands on the second of two GPUs, and on the CPU beside a GPU: nothing else is touched."""

from __future__ import annotations

import gc
import json

import pytest
from PIL import Image
from support import recorded
from support.pretended_cuda import PretendedCuda

from instantcharacter.cli.main import main


@pytest.fixture
def touched():
    """Runs a command that succeeds beside two GPUs; returns those that it touched, by number."""

    def run(command, *arguments: object) -> set[int]:
        with PretendedCuda(devices=2) as card:
            assert command(*arguments)[0] == 0
            gc.collect()
        assert not card.races
        assert card.initialized == bool(card.contexts)
        return card.contexts

    return run


@pytest.mark.parametrize(("device", "gpus"), [("cuda:1", {1}), ("cpu", set())])
@pytest.mark.parametrize("offload", ["none", "stream"])
def test_a_picture_is_generated_on_the_device_alone(generate, touched, device, gpus, offload):
    _, output = generate("--reference", recorded.PICTURE)
    expected = Image.open(output).tobytes()
    settings = ["--reference", recorded.PICTURE, "--dtype=float32", f"--device={device}", f"--offload={offload}"]
    assert touched(generate, *settings) == gpus
    assert Image.open(output).tobytes() == expected


@pytest.mark.parametrize(("device", "gpus"), [("cuda:1", {1}), ("cpu", set())])
def test_a_batch_is_generated_on_the_device_alone(models, encoders, touched, tmp_path, device, gpus):
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text("".join(json.dumps({"prompt": "a fox", "seed": seed}) + "\n" for seed in (1, 2)))

    def batch(*arguments: object) -> tuple[int]:
        settings = [f"--output={tmp_path / 'out'}", f"--model={models / 'flux'}", "--steps=2", "--size=48x32"]
        reference = ["--reference", str(recorded.PICTURE), f"--device={device}"]
        return (main(["batch", str(jobs), *settings, *encoders, *reference]),)

    assert touched(batch) == gpus


@pytest.mark.parametrize(("device", "gpus"), [("cuda:1", {1}), ("cpu", set())])
def test_a_character_is_encoded_on_the_device_alone(encoders, touched, tmp_path, device, gpus):
    def encode() -> tuple[int]:
        arguments = [f"--output={tmp_path / 'a.safetensors'}", *encoders, f"--device={device}"]
        return (main(["encode", "--reference", str(recorded.PICTURE), *arguments]),)

    assert touched(encode) == gpus
