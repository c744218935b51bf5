"""The toy models that come with the pack: whether they generate the right characters."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image, ImageChops

from instantcharacter import CharacterAdapter
from instantcharacter.cli import demo
from instantcharacter.cli.main import main
from instantcharacter.files import catalog
from instantcharacter.training.flow import CharacterFlow
from toy.evaluate import measure
from toy.world import MONSTER, draw_reference

ASSETS = catalog.TOY_FOLDER
CHARACTERS = 24
MARGIN = 0.6
MONSTER_PICTURE = ASSETS.parent / "monster.png"


@pytest.fixture(scope="module")
def toy() -> measure.Toy:
    return measure.Toy.load(ASSETS)


@pytest.fixture(scope="module")
def accuracies(toy) -> dict[float, dict[str, float]]:
    """Accuracies of held-out characters, generated without and with the adapter, by scale."""
    test = measure.random_held_out(toy, CHARACTERS, seed=1)
    flow = CharacterFlow(
        FluxTransformer2DModel.from_pretrained(ASSETS / "flux", subfolder="transformer", torch_dtype=torch.float32),
        CharacterAdapter.from_file(catalog.toy("adapter")),
        checkpointing=False,
    ).eval()
    generated = {scale: measure.generate(toy, flow, test, scale, steps=12) for scale in (0, 0.9)}
    return {scale: measure.accuracies(toy, test, pictures) for scale, pictures in generated.items()}


@pytest.mark.slow
def test_the_adapter_generates_the_character_of_the_reference(accuracies):
    assert accuracies[0]["identity"] <= 0.2
    assert accuracies[0.9]["identity"] >= accuracies[0]["identity"] + MARGIN


@pytest.mark.slow
def test_the_adapter_leaves_action_and_scene_to_the_prompt(accuracies):
    for name in ("action", "scene"):
        assert accuracies[0.9][name] >= accuracies[0][name] - 0.1
        assert accuracies[0][name] >= 0.8


def test_shipped_files_have_at_most_25_megabytes():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 25e6


def test_shipped_tokenizers_are_of_a_class_that_transformers_4_has_too():
    folder = ASSETS / "flux"
    configs = [folder / "model_index.json", *folder.glob("tokenizer*/tokenizer_config.json")]
    assert len(configs) == 3
    for config in configs:
        text = config.read_text(encoding="utf-8")
        assert "PreTrainedTokenizerFast" in text and "TokenizersBackend" not in text


def test_the_monster_is_held_out_and_a_drawing_of_the_toy_world():
    assert MONSTER.held_out
    difference = ImageChops.difference(Image.open(MONSTER_PICTURE).convert("RGB"), draw_reference(MONSTER))
    assert max(high for _, high in difference.getextrema()) <= 8


def generate(tmp_path, *arguments: str) -> Image.Image:
    output = tmp_path / "generated.png"
    options = ["--model=toy", f"--reference={MONSTER_PICTURE}", f"--prompt={demo.PROMPTS[0]}", "--steps=4", "--seed=1"]
    assert main(["generate", *options, f"--output={output}", *arguments]) == 0
    return Image.open(output)


def test_generate_runs_with_the_toy_models(tmp_path):
    plain = generate(tmp_path, "--scale=0")
    assert plain.size == (256, 256)
    assert generate(tmp_path).tobytes() != plain.tobytes()
    assert generate(tmp_path, "--size=128").size == (128, 128)


def test_the_style_lora_changes_the_picture(tmp_path):
    assert generate(tmp_path).tobytes() != generate(tmp_path, f"--lora={catalog.toy('lora')}").tobytes()


def test_encode_takes_toy_for_each_of_its_models(tmp_path):
    output = tmp_path / "monster.safetensors"
    toys = ["--siglip=toy", "--dinov2=toy", "--adapter=toy"]
    assert main(["encode", f"--reference={MONSTER_PICTURE}", f"--output={output}", *toys]) == 0
    assert output.is_file()


def test_missing_toy_models_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(catalog, "TOY_FOLDER", tmp_path)
    options = ["--model=toy", f"--reference={MONSTER_PICTURE}", "--prompt=a", f"--output={tmp_path / 'a.png'}"]
    assert main(["generate", *options]) == 2
    assert "clone" in capsys.readouterr().err


def test_the_demo_shows_four_prompts_at_three_scales_and_in_a_style(tmp_path, capsys, monkeypatch):
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
