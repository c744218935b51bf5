from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from support import recorded, tiny

from instantcharacter import CharacterAdapter, InstantCharacterPipeline
from instantcharacter.cli.loading import choose_device, choose_dtype
from instantcharacter.cli.main import main
from instantcharacter.files import folders as model_folders

SINGLE_FILES = {"model": "transformer", "clip-l": "text_encoder", "t5": "text_encoder_2", "vae": "vae"}
"""The components of a pipeline by their option."""


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory) -> Path:
    """A ComfyUI folder with vocabularies, and with FLUX in single files and as a diffusers folder among its models."""
    comfyui = tmp_path_factory.mktemp("files") / "ComfyUI"
    parts = {**tiny.tiny_components(), "transformer": recorded.transformer()}
    InstantCharacterPipeline(**parts).save_pretrained(comfyui / "models/diffusers/flux")
    for name, part in SINGLE_FILES.items():
        parts[part].save_pretrained(comfyui / "models" / name)
    for folder, tokenizer in zip(model_folders.TOKENIZERS, ("tokenizer", "tokenizer_2")):
        parts[tokenizer].save_pretrained(comfyui / folder)
    (comfyui / "custom_nodes").mkdir()
    recorded.adapter().save(comfyui / "models/adapter.safetensors")
    return comfyui


@pytest.fixture
def flux_files(comfyui) -> dict[str, str]:
    """The options for FLUX in single files, and their paths."""
    return {f"--{name}": str(next((comfyui / "models" / name).glob("*.safetensors"))) for name in SINGLE_FILES}


@pytest.fixture
def generate_from(comfyui, tmp_path, monkeypatch):
    """Runs ``generate`` with the recorded adapter outside of ComfyUI; returns its status and the picture's path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_folders, "__file__", str(tmp_path / "folders.py"))

    def run(flux: dict[str, str], *more: str) -> tuple[int, Path]:
        output = tmp_path / "out.png"
        settings = ["--prompt=a fox", "--steps=2", "--size=64", "--seed=5", f"--reference={recorded.PICTURE}"]
        encoders = [f"--{name}={recorded.FOLDER / name}" for name in ("siglip", "dinov2")]
        adapter = f"--adapter={comfyui / 'models/adapter.safetensors'}"
        flux = [f"{option}={value}" for option, value in flux.items()]
        return main(["generate", *settings, *encoders, adapter, *flux, f"--output={output}", *more]), output

    return run


def test_flux_in_single_files_generates_the_picture_of_its_folder(generate_from, comfyui, flux_files):
    status, output = generate_from({"--model": str(comfyui / "models/diffusers/flux")})
    assert status == 0
    expected = Image.open(output).copy()
    output.unlink()
    assert generate_from(flux_files)[0] == 0
    difference = ImageChops.difference(Image.open(output), expected)
    assert max(high for _, high in difference.getextrema()) <= 1  # other memory alignment, other order of summation
    assert json.loads(Image.open(output).text["instantcharacter"])["model"] == Path(flux_files["--model"]).name


def test_single_files_replace_parts_of_a_flux_folder(generate_from, comfyui, flux_files):
    flux = {"--model": str(comfyui / "models/diffusers/flux"), "--vae": flux_files["--vae"]}
    assert generate_from(flux)[0] == 0


def test_without_a_comfyui_the_vocabularies_are_downloaded(
    generate_from, comfyui, flux_files, tmp_path, error_line, monkeypatch
):
    fetched = []

    def fetch(repo: str, file: str) -> str:
        fetched.append((repo, file))
        folder = file.split("/")[0]
        shutil.copytree(
            comfyui / model_folders.TOKENIZERS[folder == "tokenizer_2"], tmp_path / folder, dirs_exist_ok=True
        )
        return str(tmp_path / file)

    monkeypatch.setattr(model_folders, "comfyui_folder", lambda *_: None)
    status, _ = generate_from(flux_files)
    assert status == 2
    assert "come with ComfyUI, and this runs in none" in error_line()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    assert generate_from(flux_files)[0] == 0
    assert fetched == [("black-forest-labs/FLUX.1-dev", file) for file in model_folders.HUB_TOKENIZERS]


@pytest.mark.parametrize(
    ("available", "named", "device"),
    [
        ({"mps"}, None, "mps"),
        ({"cuda"}, None, "cuda"),
        (set(), None, "cpu"),
        ({"cuda"}, "cpu", "cpu"),
        ({"mps"}, "cpu", "cpu"),
    ],
)
def test_device_and_dtype_suit_the_machine(monkeypatch, available, named, device):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in available)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in available)
    assert choose_device(named) == torch.device(device)
    assert choose_dtype(None, torch.device(device)) == (torch.float32 if device == "cpu" else torch.bfloat16)
    assert choose_dtype("float16", torch.device(device)) == torch.float16


@pytest.mark.parametrize("named", ["meta", "cuda:9", "xpu", "paper", ""])
def test_device_that_the_machine_does_not_have_is_refused(named):
    with pytest.raises(ValueError, match="--device .* no such device here .* expected cpu, cuda or mps"):
        choose_device(named)


@pytest.mark.parametrize("option", ["--siglip", "--dinov2", "--model"])
def test_unreachable_repository_is_named(generate, error_line, option):
    assert generate("--reference", recorded.PICTURE, option, "nobody/nothing")[0] == 2
    assert error_line().startswith("error: nobody/nothing could not be had: ")


def test_adapter_is_found_in_its_folder(generate, models, tmp_path):
    _, output = generate("--reference", recorded.PICTURE)
    expected = Image.open(output).tobytes()
    CharacterAdapter.from_file(models / "adapter.safetensors").save(tmp_path / "ip/instantcharacter_ip-adapter.bin")
    (tmp_path / "ip/instantcharacter_ip-adapter.json").write_text(json.dumps(asdict(tiny.ADAPTER)))
    assert generate("--reference", recorded.PICTURE, "--adapter", tmp_path / "ip")[0] == 0
    assert Image.open(output).tobytes() == expected


def test_unreachable_hub_names_the_file_to_fetch_by_hand(generate, error_line):
    status, _ = generate("--reference", recorded.PICTURE, "--adapter", "nobody/nothing")
    assert status == 2
    assert "Fetch it by hand from https://huggingface.co/nobody/nothing" in error_line()
