from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support import recorded

from instantcharacter.batch.cache import JobCache
from instantcharacter.batch.folder import OutputFolder
from instantcharacter.batch.generator import Generator
from instantcharacter.batch.groups import Batch

SMALL = {"size": "64x48", "steps": 2}
LORA = f"{recorded.LORA}:0.8"


@pytest.fixture
def generator(pipeline, character, tmp_path, jobs_of):
    """Returns a generator into a new folder, and the folder; the recorded picture's character is in its cache."""

    def make(name: str = "out", changed=pipeline) -> tuple[Generator, OutputFolder]:
        output, cache = OutputFolder(tmp_path / name), JobCache(tmp_path / name / ".cache")
        (job,) = jobs_of({"prompt": "a"})
        cache.save(job.settings.reference[0], character)
        return Generator(changed, cache, output, 0.0, {}), output

    return make


def pixels(folder: OutputFolder, name: str) -> np.ndarray:
    return np.asarray(Image.open(folder.path / name), dtype=int)


def logged(folder: OutputFolder) -> list[dict]:
    return [json.loads(line) for log in folder.cache.glob("*.jsonl") for line in log.read_text().splitlines()]


@pytest.mark.parametrize("more", [{}, {"true_cfg": 2, "negative_prompt": "snow"}, {"region": "left.png"}])
def test_a_picture_of_a_batch_is_the_single_one(generator, jobs_of, pipeline, character, tmp_path, more):
    region = Image.new("L", (64, 48))
    region.paste(255, (0, 0, 32, 48))
    region.save(tmp_path / "left.png")
    jobs = jobs_of(*({"prompt": f"picture {i}", **SMALL, **more} for i in range(3)))
    together, folder = generator()
    together.generate([Batch(tuple(jobs))], ())
    again, other = generator("again")
    again.generate([Batch(tuple(jobs))], ())
    for job in jobs:
        image = pipeline(
            job.prompt,
            negative_prompt=job.negative_prompt,
            true_cfg_scale=job.settings.true_cfg,
            subject_image=character,
            subject_mask=tmp_path / "left.png" if "region" in more else None,
            width=64,
            height=48,
            num_inference_steps=2,
            guidance_scale=3.5,
            generator=torch.Generator().manual_seed(job.seed),
        ).images[0]
        found = pixels(folder, job.output)
        assert np.abs(found - np.asarray(image, dtype=int)).max() <= 1
        assert (found == pixels(other, job.output)).all()
    assert len({pixels(folder, job.output).tobytes() for job in jobs}) == 3


def test_loras_act_on_their_lines_alone(generator, jobs_of, pipeline):
    rows = [{}, {"lora": LORA}, {"lora": LORA.replace("0.8", "-1")}]
    plain, styled, other = jobs_of(*({"prompt": "a", "seed": 1, **SMALL, **row} for row in rows))
    before, folder = generator("before")
    before.generate([Batch((plain,))], ())
    batches = [Batch((job,)) for job in (styled, plain, other, plain, styled)]
    with_loras, output = generator()
    with_loras.load_loras(batches)
    found = []
    for batch in batches:
        with_loras.generate([batch], ())
        found.append(pixels(output, batch.jobs[0].output).tobytes())
    assert found[1] == found[3] == pixels(folder, plain.output).tobytes()
    assert found[0] == found[4]
    assert len(set(found)) == 3


def test_pictures_that_are_present_are_not_written(generator, jobs_of):
    jobs = jobs_of(*({"prompt": f"picture {i}", **SMALL} for i in range(2)))
    made, folder = generator()
    made.generate([Batch(tuple(jobs))], {"0001.png"})
    assert [job.output for job in folder.present(jobs)] == ["0002.png"]


def test_a_batch_that_fails_is_written_down_and_the_others_go_on(generator, jobs_of, pipeline, monkeypatch):
    jobs = jobs_of(*({"prompt": f"picture {i}", **SMALL} for i in range(2)))
    decode, failures = pipeline.vae.decode, iter([torch.OutOfMemoryError("out of memory.\nTry less")])

    def fail_once(*args, **kwargs):
        for error in failures:
            raise error
        return decode(*args, **kwargs)

    monkeypatch.setattr(pipeline.vae, "decode", fail_once)
    made, folder = generator()
    made.generate([Batch((job,)) for job in jobs], ())
    first, second = logged(folder)
    assert first == {"output": "0001.png", "error": "out of memory."}
    assert "seconds" in second
    assert [job.output for job in folder.present(jobs)] == ["0002.png"]


def test_a_picture_that_is_not_finite_is_written_down_and_its_neighbours_are_there(
    generator, jobs_of, pipeline, monkeypatch
):
    jobs = jobs_of(*({"prompt": f"picture {i}", **SMALL} for i in range(2)))
    decode = pipeline.vae.decode

    def broken(latents, **kwargs):
        latents[0] = float("nan")
        return decode(latents, **kwargs)

    monkeypatch.setattr(pipeline.vae, "decode", broken)
    made, folder = generator()
    made.generate([Batch(tuple(jobs))], ())
    assert [job.output for job in folder.present(jobs)] == ["0002.png"]
    assert logged(folder)[0] == {"output": "0001.png", "error": "the picture has values that are not finite (NaN)"}


def test_a_lora_that_does_not_fit_fails_its_lines_alone(generator, jobs_of, tmp_path):
    layer, path = "transformer.transformer_blocks.0.attn.to_q", tmp_path / "wide.safetensors"
    save_file({f"{layer}.lora_A.weight": torch.ones(2, 99), f"{layer}.lora_B.weight": torch.ones(99, 2)}, path)
    jobs = jobs_of({"prompt": "a", "lora": "wide.safetensors", **SMALL}, {"prompt": "b", **SMALL})
    batches = [Batch((job,)) for job in jobs]
    made, folder = generator()
    made.load_loras(batches)
    made.encode_prompts([])
    made.generate(batches, ())
    assert "is for a model of another width" in logged(folder)[0]["error"]
    assert [job.output for job in folder.present(jobs)] == ["0002.png"]


def test_a_full_disk_stops_the_job(generator, jobs_of, monkeypatch):
    (job,) = jobs_of({"prompt": "a", **SMALL})
    made, folder = generator()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "0001.png")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        made.generate([Batch((job,))], ())
    assert list(Path(folder.path).glob("*.png*")) == []


def test_the_offloader_moves_embeddings_to_its_device(generator, jobs_of, pipeline):
    jobs = jobs_of(*({"prompt": f"picture {i}", **SMALL} for i in range(2)))
    plain, folder = generator("plain")
    plain.generate([Batch(tuple(jobs))], ())
    pipeline.enable_character_offload("stream", device="cpu")
    streamed, output = generator("streamed")
    streamed.generate([Batch(tuple(jobs))], ())
    for job in jobs:
        assert (pixels(folder, job.output) == pixels(output, job.output)).all()
