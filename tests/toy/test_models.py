"""The toy models that come with the pack: what they draw, and whether it is who it should be."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image, ImageChops

from instantcharacter import CharacterAdapter
from instantcharacter.cli import demo
from instantcharacter.cli.main import main
from instantcharacter.files import catalog as models
from instantcharacter.training.flow import CharacterFlow
from toy import measure
from toy.world import MONSTER, draw_reference

ASSETS = models.TOY_FOLDER
CHARACTERS = 24
MARGIN = 0.6
MONSTER_PICTURE = ASSETS.parent / "monster.png"


@pytest.fixture(scope="module")
def toy() -> measure.Toy:
    return measure.Toy.load(ASSETS)


@pytest.fixture(scope="module")
def drawn(toy) -> dict[float, torch.Tensor]:
    """Characters that nothing was trained on, drawn without and with the adapter: the judge's answers, by scale."""
    test = measure.new_test(toy, CHARACTERS, seed=1)
    flow = CharacterFlow(
        FluxTransformer2DModel.from_pretrained(ASSETS / "flux", subfolder="transformer", torch_dtype=torch.float32),
        CharacterAdapter.from_file(models.toy("adapter")),
        checkpointing=False,
    ).eval()
    return {scale: measure.judged(toy, test, measure.draw_test(toy, flow, test, scale, steps=12)) for scale in (0, 0.9)}


def test_the_adapter_draws_the_character_that_is_asked_for(drawn):
    assert drawn[0]["identity"] <= 0.2
    assert drawn[0.9]["identity"] >= drawn[0]["identity"] + MARGIN


def test_the_adapter_leaves_action_and_scene_to_the_prompt(drawn):
    for name in ("action", "scene"):
        assert drawn[0.9][name] >= drawn[0][name] - 0.1
        assert drawn[0][name] >= 0.8


def test_everything_shipped_is_at_most_25_megabytes():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 25e6


def test_the_monster_is_for_testing_and_what_the_toy_world_draws():
    assert MONSTER.held_out
    difference = ImageChops.difference(Image.open(MONSTER_PICTURE).convert("RGB"), draw_reference(MONSTER))
    assert max(high for _, high in difference.getextrema()) <= 8


def generate(tmp_path, *arguments: str) -> Image.Image:
    output = tmp_path / "drawn.png"
    told = ["--model=toy", f"--reference={MONSTER_PICTURE}", f"--prompt={demo.PROMPTS[0]}", "--steps=4", "--seed=1"]
    assert main(["generate", *told, f"--output={output}", *arguments]) == 0
    return Image.open(output)


def test_generate_draws_with_the_toy_models(tmp_path):
    plain = generate(tmp_path, "--scale=0")
    assert plain.size == (256, 256)
    assert generate(tmp_path).tobytes() != plain.tobytes()
    assert generate(tmp_path, "--size=128").size == (128, 128)


def test_the_style_lora_changes_what_is_drawn(tmp_path):
    assert generate(tmp_path).tobytes() != generate(tmp_path, f"--lora={models.toy('lora')}").tobytes()


def test_encode_takes_toy_for_each_of_its_models(tmp_path):
    output = tmp_path / "monster.safetensors"
    toys = ["--siglip=toy", "--dinov2=toy", "--adapter=toy"]
    assert main(["encode", f"--reference={MONSTER_PICTURE}", f"--output={output}", *toys]) == 0
    assert output.is_file()


def test_toy_models_that_are_not_there_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "TOY_FOLDER", tmp_path)
    told = ["--model=toy", f"--reference={MONSTER_PICTURE}", "--prompt=a", f"--output={tmp_path / 'a.png'}"]
    assert main(["generate", *told]) == 2
    assert "clone" in capsys.readouterr().err


def test_demo_draws_four_prompts_at_three_scales_and_in_a_style(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "STEPS", 2)
    output = tmp_path / "demo.png"
    assert main(["demo", f"--output={output}"]) == 0
    assert "python -m instantcharacter generate --reference" in capsys.readouterr().out
    page = Image.open(output)
    across, down = demo.SIDE + 12, demo.SIDE + 26
    panels = [
        page.crop(
            (12 + column * across, 26 + row * down, 12 + column * across + demo.SIDE, 26 + row * down + demo.SIDE)
        )
        for row in range(4)
        for column in range(1, 5)
    ]
    assert len({panel.tobytes() for panel in panels}) == 16
