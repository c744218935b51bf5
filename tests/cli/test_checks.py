from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import recorded

from instantcharacter import Character
from instantcharacter.cli.main import main

FLUX_FILES = ("--model", "--clip-l", "--t5", "--vae")


@pytest.fixture
def flux_files(tmp_path) -> dict[str, str]:
    """The options for FLUX in single files, and their paths."""
    for option in FLUX_FILES:
        (tmp_path / f"{option}.safetensors").touch()
    return {option: f"{tmp_path}/{option}.safetensors" for option in FLUX_FILES}


@pytest.fixture
def generate_from(generate):
    """Runs ``generate`` with FLUX from these options."""
    return lambda flux: generate("--reference", recorded.PICTURE, *(f"{name}={path}" for name, path in flux.items()))


@pytest.mark.parametrize("missing", FLUX_FILES[1:])
def test_flux_in_one_file_without_its_other_files_is_refused(generate_from, flux_files, error_line, missing, no_models):
    del flux_files[missing]
    assert generate_from(flux_files)[0] == 2
    assert error_line().endswith(f"is FLUX alone: give {missing} FILE too")


@pytest.mark.parametrize("missing", FLUX_FILES)
def test_missing_flux_file_is_refused_before_models_are_loaded(
    generate_from, flux_files, error_line, missing, no_models
):
    assert generate_from({**flux_files, missing: "gone.safetensors"})[0] == 2
    assert "file gone.safetensors" in error_line()


def test_files_beside_a_hub_id_are_refused(generate_from, flux_files, error_line, no_models):
    assert generate_from({**flux_files, "--model": "black-forest-labs/FLUX.1-dev"})[0] == 2
    assert error_line().endswith("--clip-l, --t5, --vae: only with --model FILE or FOLDER")


def test_8_bit_arithmetic_without_a_gpu_is_refused_before_models_are_loaded(generate, error_line, no_models):
    assert generate("--reference", recorded.PICTURE, "--device=cpu", "--fp8-fast")[0] == 2
    assert "needs an NVIDIA GPU of compute capability 8.9 or later" in error_line()


@pytest.mark.parametrize("taken_by", ["adapter", "text", "folder"])
@pytest.mark.parametrize("command", ["encode", "generate"])
def test_character_replaces_nothing_but_a_character(
    generate, encoders, models, tmp_path, error_line, no_models, command, taken_by
):
    path = tmp_path / "taken.safetensors"
    if taken_by == "folder":
        path.mkdir()
    else:
        path.write_bytes((models / "adapter.safetensors").read_bytes() if taken_by == "adapter" else b"my notes")
    before = None if path.is_dir() else path.read_bytes()
    if command == "encode":
        assert main(["encode", f"--reference={recorded.PICTURE}", f"--output={path}", *encoders]) == 2
    else:
        assert generate("--reference", recorded.PICTURE, "--save-character", path)[0] == 2
    refused = "Is a directory" if taken_by == "folder" else "is there already and is not a character"
    assert refused in error_line()
    assert before is None or path.read_bytes() == before


@pytest.mark.parametrize("existing", ["character", "empty"])
def test_character_replaces_a_character_or_an_empty_file(encoders, tmp_path, existing):
    path = tmp_path / "fox.safetensors"
    if existing == "empty":
        path.touch()
    else:
        Character(torch.zeros(1, 4, 80), "0" * 32).save(path)
    assert main(["encode", f"--reference={recorded.PICTURE}", f"--output={path}", *encoders]) == 0
    assert Character.load(path).fingerprint != "0" * 32


def test_character_is_not_saved_over_an_input(generate, tmp_path, error_line, no_models):
    fox = tmp_path / "fox.safetensors"
    Character(torch.zeros(1, 4, 80), "0" * 32).save(fox)
    status, _ = generate("--reference", recorded.PICTURE, "--character", fox, "--save-character", fox)
    assert status == 2
    assert "fox.safetensors is what the picture is made of" in error_line()


@pytest.mark.parametrize("command", ["generate", "demo"])
@pytest.mark.parametrize(
    ("taken_by", "message"),
    [
        ("folder", "Is a directory"),
        ("JPEG", "is there already and is not a PNG"),
        ("text", "is there already and is not a PNG"),
        ("reference", "is what the picture is made of"),
    ],
)
def test_picture_replaces_nothing_but_another_picture(
    generate, tmp_path, error_line, monkeypatch, no_models, command, taken_by, message
):
    monkeypatch.setattr("instantcharacter.cli.demo.generate_demo", lambda *_: pytest.fail("the sheet was generated"))
    path, reference = tmp_path / "taken.png", recorded.PICTURE
    if taken_by == "folder":
        path.mkdir()
    elif taken_by == "JPEG":
        Image.open(recorded.PICTURE).convert("RGB").save(path, format="JPEG")
    elif taken_by == "text":
        path.write_text("my notes")
    else:
        reference = path
        path.write_bytes(Path(recorded.PICTURE).read_bytes())
    before = None if path.is_dir() else path.read_bytes()
    arguments = ("--reference", reference, "--output", path)
    status = generate(*arguments)[0] if command == "generate" else main(["demo", *map(str, arguments)])
    assert status == 2
    assert message in error_line()
    assert before is None or path.read_bytes() == before


def test_picture_replaces_the_previous_picture(generate, tmp_path):
    for _ in range(2):
        assert generate("--reference", recorded.PICTURE)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.png"]


def test_writability_check_touches_no_file(generate, tmp_path, capsys):
    mine = tmp_path / ".out.png.trial"
    mine.write_text("mine")
    assert generate("--character", "gone.safetensors")[0] == 2
    assert generate("--reference", recorded.PICTURE, "--lora", "gone.safetensors")[0] == 2
    assert generate("--reference", recorded.PICTURE)[0] == 0
    assert mine.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.png.trial", "out.png"]


def test_name_too_long_for_the_disk_is_refused_before_models_are_loaded(generate, tmp_path, error_line, no_models):
    status, _ = generate("--reference", recorded.PICTURE, "--output", tmp_path / f"{'a' * 248}.png")
    assert status == 2
    assert "File name too long" in error_line()


@pytest.mark.parametrize("command", ["generate", "encode"])
@pytest.mark.parametrize("option", ["--siglip", "--dinov2", "--adapter"])
@pytest.mark.parametrize("typed", ["gone.safetensors", "./gone", "models/gone/here", "gone", "", "models\\gone"])
def test_missing_model_is_refused_before_others_are_loaded(
    generate, tmp_path, error_line, monkeypatch, no_models, command, option, typed
):
    monkeypatch.chdir(tmp_path)
    if command == "generate":
        assert generate("--reference", recorded.PICTURE, option, typed)[0] == 2
    else:
        assert main(["encode", "--reference", str(recorded.PICTURE), option, typed, "--output", "fox.safetensors"]) == 2
    assert re.fullmatch(rf"error: there is no file .*{re.escape(repr(typed)[1:-1])}.*\({option}\)", error_line())


@pytest.mark.parametrize("option", ["--reference", "--mask", "--character", "--lora"])
@pytest.mark.parametrize("typed", ["gone.png", "/", "", "x" * 300])
def test_missing_file_is_a_one_line_error(generate, error_line, no_models, option, typed):
    reference = () if option == "--reference" else ("--reference", recorded.PICTURE)
    assert generate(*reference, option, typed)[0] == 2
    assert error_line()
