from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from support import recorded, tiny
from support.fp8 import needs_fp8_arithmetic
from support.pretended_cuda import PretendedCuda

from instantcharacter import Character, InstantCharacterPipeline, Strength
from instantcharacter.cli.main import main
from instantcharacter.flux.sweep import cross, labelled_page


@pytest.mark.parametrize("settings", [["--offload=stream"], ["--offload=model"], ["--vram=9"]])
def test_offload_generates_the_same_picture(generate, settings):
    pictures = []
    for arguments in ([], settings):
        status, output = generate("--reference", recorded.PICTURE, *arguments)
        assert status == 0
        pictures.append(Image.open(output).tobytes())
    assert pictures[0] == pictures[1]


def test_fp8_and_compiled_pictures_are_generated(generate, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda forward, **_: compiled.append(1) or forward)
    assert generate("--reference", recorded.PICTURE, "--fp8")[0] == 0
    assert not compiled
    assert generate("--reference", recorded.PICTURE, "--compile")[0] == 0
    assert len(compiled) == 4


@needs_fp8_arithmetic
def test_a_picture_is_generated_in_8_bit_arithmetic(generate):
    pictures = []
    for arguments in ([], ["--fp8-fast"]):
        with PretendedCuda():
            status, output = generate("--reference", recorded.PICTURE, "--dtype=float32", *arguments)
        assert status == 0
        pictures.append(Image.open(output).tobytes())
    assert pictures[0] != pictures[1]


def test_the_cache_changes_the_picture_and_is_among_its_settings(generate):
    pictures = []
    for cache in ([], ["--cache", "1e-9"], ["--cache", "9"]):
        status, output = generate("--reference", recorded.PICTURE, "--steps=8", *cache)
        assert status == 0
        image = Image.open(output)
        pictures.append((image.tobytes(), json.loads(image.text["instantcharacter"]).get("cache")))
    (plain, none), (exact, low), (cached, high) = pictures
    assert exact == plain != cached
    assert (none, low, high) == (None, 1e-9, 9)


def test_the_grids_pictures_are_the_single_ones_bit_for_bit(generate):
    axes = {"scale": (0.0, 0.9), "guidance": (1.0, 3.5), "seed": (5, 6)}
    reference = ("--reference", recorded.PICTURE)
    status, output = generate(*reference, "--grid", *(f"{name}={a},{b}" for name, (a, b) in axes.items()))
    assert status == 0
    page = Image.open(output)
    page.load()
    empty, corners = labelled_page(axes, (48, 32))
    pictures = [page.crop((x, y, x + 48, y + 32)) for x, y in corners]
    for settings, picture, corner in zip(cross(axes), pictures, corners):
        _, output = generate(*reference, *(f"--{name}={value}" for name, value in settings.items()))
        assert Image.open(output).tobytes() == picture.tobytes(), settings
        empty.paste(picture, corner)
    assert len({picture.tobytes() for picture in pictures}) == 8
    assert page.convert("RGB").tobytes() == empty.tobytes()


def test_a_grid_carries_its_settings(generate, capsys):
    _, output = generate("--reference", recorded.PICTURE, "--grid", "scale=0.6,0.9")
    settings = json.loads(Image.open(output).text["instantcharacter"])
    assert settings["grid"] == {"scale": [0.6, 0.9]}
    assert "scale" not in settings
    assert settings["seed"] == 5
    assert capsys.readouterr().out.endswith("(seed 5)\n")
    generate("--reference", recorded.PICTURE, "--grid", "seed=1,2")
    assert "(seed" not in capsys.readouterr().out


def test_a_grid_too_large_for_a_page_is_refused(generate, no_models, error_line):
    seeds = ",".join(map(str, range(200)))
    status, _ = generate("--reference", recorded.PICTURE, "--size", "1024x1024", "--grid", f"seed={seeds}")
    assert status == 2
    assert error_line().startswith("error: 200 pictures of 1024×1024; expected at most 128 of this size on a page")


def test_a_grid_that_names_a_setting_twice_is_refused(generate, no_models, error_line):
    status, output = generate("--reference", recorded.PICTURE, "--grid", "scale=0.6", "scale=0.9")
    assert status == 2
    assert not output.exists()
    assert "--grid names scale scale: name each setting once" in error_line()


def test_too_little_gpu_memory_is_an_error_with_the_needed_size(generate, error_line):
    status, _ = generate("--reference", recorded.PICTURE, "--vram=0.5")
    assert status == 2
    assert "0.50 GiB of GPU memory are too little" in error_line()


def test_generate_writes_a_picture_that_carries_its_settings(generate):
    status, output = generate("--reference", recorded.PICTURE, "--scale", 0.8, "--guidance", 2.5)
    image = Image.open(output)
    assert (status, image.size) == (0, (48, 32))
    assert image.text["Description"] == "a fox"
    assert json.loads(image.text["instantcharacter"]) == {
        "prompt": "a fox",
        "scale": [0.8],
        "steps": 2,
        "guidance": 2.5,
        "size": "48x32",
        "seed": 5,
        "lora": [],
        "model": "flux",
    }


def test_a_strength_over_steps_and_blocks_is_the_librarys(generate, monkeypatch):
    scales: list = []
    call = InstantCharacterPipeline.__call__
    monkeypatch.setattr(
        InstantCharacterPipeline,
        "__call__",
        lambda self, *args, **settings: scales.append(settings["subject_scale"]) or call(self, *args, **settings),
    )
    status, output = generate("--reference", recorded.PICTURE, "--scale", "1.2:0.9:0.6", "--scale-single", 0.8)
    settings = json.loads(Image.open(output).text["instantcharacter"])
    assert (status, scales) == (0, [[Strength(1.2, 0.9, 0.6, single_blocks=0.8)]])
    assert (settings["scale"], settings["scale_single"]) == (["1.2:0.9:0.6"], [0.8])
    assert "scale_double" not in settings


def test_one_number_is_the_size_of_a_square(generate):
    status, output = generate("--reference", recorded.PICTURE, "--size", 64)
    assert (status, Image.open(output).size) == (0, (64, 64))


def test_saved_character_generates_the_same_picture(generate, tmp_path):
    character = tmp_path / "fox.safetensors"
    _, output = generate("--reference", recorded.PICTURE, "--save-character", character)
    first = Image.open(output).tobytes()
    status, output = generate("--character", character)
    assert status == 0
    assert Image.open(output).tobytes() == first
    _, output = generate("--character", character, "--scale", 0)
    assert Image.open(output).tobytes() != first


def test_a_folded_adapter_generates_the_same_picture_of_a_saved_character(generate, models, tmp_path, error_line):
    character, folded = tmp_path / "fox.safetensors", tmp_path / "folded.safetensors"
    assert main(["convert", f"{models}/adapter.safetensors", "--folded", "--dtype=float32", f"--output={folded}"]) == 0
    _, output = generate("--reference", recorded.PICTURE, "--save-character", character)
    first = Image.open(output).tobytes()
    status, output = generate("--character", character, "--adapter", folded)
    assert status == 0
    assert Image.open(output).tobytes() == first
    status, _ = generate("--reference", recorded.PICTURE, "--adapter", folded)
    assert status == 2
    assert "this adapter is folded: its weights generate pictures, but cannot make a character" in error_line()


def test_encode_makes_the_character_that_generate_saves(generate, encoders, tmp_path):
    encoded, saved = tmp_path / "encoded.safetensors", tmp_path / "saved.safetensors"
    assert main(["encode", f"--reference={recorded.PICTURE}", f"--output={encoded}", *encoders]) == 0
    generate("--reference", recorded.PICTURE, "--save-character", saved)
    assert torch.equal(Character.load(encoded).fused, Character.load(saved).fused)


def test_several_characters_each_with_a_scale(generate, tmp_path):
    mirrored = tmp_path / "mirrored.png"
    Image.open(recorded.PICTURE).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mirrored)
    both = ("--reference", recorded.PICTURE, "--reference", mirrored)
    status, output = generate(*both, "--scale", 0.5, 0.9)
    first = Image.open(output).tobytes()
    assert status == 0
    _, output = generate(*both, "--scale", 0.9, 0.5)
    assert Image.open(output).tobytes() != first


def test_another_adapters_character_is_refused_before_flux_is_loaded(generate, tmp_path, error_line, monkeypatch):
    Character(torch.zeros(1, 4, 80), "0" * 32).save(tmp_path / "stranger.safetensors")
    monkeypatch.setattr(InstantCharacterPipeline, "from_pretrained", lambda *_, **__: pytest.fail("FLUX was loaded"))
    status, _ = generate("--character", tmp_path / "stranger.safetensors")
    assert status == 2
    assert "made by adapter 0000" in error_line()


def test_mask_changes_the_picture(generate, tmp_path):
    _, output = generate("--reference", recorded.PICTURE)
    whole = Image.open(output).tobytes()
    mask = Image.new("L", Image.open(recorded.PICTURE).size, 0)
    mask.paste(255, (50, 50, 200, 300))
    mask.save(tmp_path / "mask.png")
    status, output = generate("--reference", recorded.PICTURE, "--mask", tmp_path / "mask.png")
    assert status == 0
    assert Image.open(output).tobytes() != whole


def test_lora_changes_the_picture_with_its_weight(generate, tmp_path):
    from diffusers import FluxPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    transformer = tiny.tiny_components()["transformer"]
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = get_peft_model_state_dict(transformer)
    FluxPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers, weight_name="style.safetensors")
    pictures = set()
    for lora in (["--lora", f"{tmp_path}/style.safetensors:{weight}"] for weight in (0.5, 2)):
        status, output = generate("--reference", recorded.PICTURE, *lora)
        assert status == 0
        pictures.add(Image.open(output).tobytes())
    status, output = generate("--reference", recorded.PICTURE)
    pictures.add(Image.open(output).tobytes())
    assert len(pictures) == 3
