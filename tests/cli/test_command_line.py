from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from PIL import Image, ImageChops
from support import recorded, tiny

from instantcharacter import Character, CharacterAdapter, CharacterEncoder, InstantCharacterPipeline
from instantcharacter.cli import main as command_line
from instantcharacter.cli.main import main
from instantcharacter.files import folders as model_folders
from instantcharacter.files.folders import TOKENIZERS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Tiny models on disk, as the hub would lay them out."""
    folder = tmp_path_factory.mktemp("models")
    InstantCharacterPipeline(**tiny.tiny_components()).save_pretrained(folder / "flux")
    tiny.tiny_adapter().save(folder / "adapter.safetensors")
    encoder = tiny.tiny_encoder()
    encoder.siglip.save_pretrained(folder / "siglip")
    encoder.dinov2.save_pretrained(folder / "dinov2")
    return folder


@pytest.fixture
def encoders(models) -> list[str]:
    return [f"--{name}={models / name}" for name in ("siglip", "dinov2")] + [f"--adapter={models}/adapter.safetensors"]


@pytest.fixture
def generate(models, encoders, tmp_path):
    """Runs ``generate`` with small settings; returns the exit status and the picture's path."""

    def run(*arguments: object) -> tuple[int, Path]:
        output = tmp_path / "out.png"
        settings = ["--prompt=a fox", f"--output={output}", "--steps=2", "--size=48x32", "--seed=5"]
        return main(["generate", *settings, f"--model={models / 'flux'}", *encoders, *map(str, arguments)]), output

    return run


def error_line(capsys) -> str:
    """What was printed as the error: the only line that is not a progress bar."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("settings", [["--offload=stream"], ["--offload=model"], ["--vram=9"]])
def test_offload_draws_the_same_picture(generate, settings):
    pictures = []
    for arguments in ([], settings):
        status, output = generate("--reference", recorded.PICTURE, *arguments)
        assert status == 0
        pictures.append(Image.open(output).tobytes())
    assert pictures[0] == pictures[1]


def test_fp8_and_compiled_pictures_are_drawn(generate, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda forward, **_: compiled.append(1) or forward)
    assert generate("--reference", recorded.PICTURE, "--fp8")[0] == 0
    assert not compiled
    assert generate("--reference", recorded.PICTURE, "--compile")[0] == 0
    assert len(compiled) == 4


def test_too_little_gpu_memory_is_refused_with_what_is_needed(generate, capsys):
    status, _ = generate("--reference", recorded.PICTURE, "--vram=0.5")
    assert status == 2
    assert "0.50 GiB of GPU memory are too little" in error_line(capsys)


def test_generate_draws_a_picture_that_carries_its_settings(generate):
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


def test_one_number_is_the_size_of_a_square(generate):
    status, output = generate("--reference", recorded.PICTURE, "--size", 64)
    assert (status, Image.open(output).size) == (0, (64, 64))


def test_saved_character_draws_the_same_picture(generate, tmp_path):
    character = tmp_path / "fox.safetensors"
    _, output = generate("--reference", recorded.PICTURE, "--save-character", character)
    first = Image.open(output).tobytes()
    status, output = generate("--character", character)
    assert status == 0
    assert Image.open(output).tobytes() == first
    _, output = generate("--character", character, "--scale", 0)
    assert Image.open(output).tobytes() != first


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


def test_another_adapters_character_is_refused_before_flux_is_loaded(generate, tmp_path, capsys, monkeypatch):
    Character(torch.zeros(1, 4, 80), "0" * 32).save(tmp_path / "stranger.safetensors")
    monkeypatch.setattr(InstantCharacterPipeline, "from_pretrained", lambda *_, **__: pytest.fail("FLUX was loaded"))
    status, _ = generate("--character", tmp_path / "stranger.safetensors")
    assert status == 2
    assert "made by adapter 0000" in error_line(capsys)


def test_mask_changes_what_is_seen(generate, tmp_path):
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


def test_convert_writes_safetensors_beside_the_original(tmp_path, models, monkeypatch):
    monkeypatch.setattr("instantcharacter.model.adapter.RELEASED", tiny.ADAPTER)
    adapter = tiny.tiny_adapter()
    adapter.save(tmp_path / "ip.bin")
    assert main(["convert", str(tmp_path / "ip.bin")]) == 0
    converted = CharacterAdapter.from_file(tmp_path / "ip.safetensors")
    assert converted.config == tiny.ADAPTER
    assert converted.fingerprint() == adapter.fingerprint()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ip.bin", "ip.safetensors"]


def test_convert_does_not_write_over_a_file(tmp_path, models, capsys):
    source = models / "adapter.safetensors"
    before = source.read_bytes()
    assert main(["convert", str(source)]) == 2
    assert "is there already" in error_line(capsys)
    assert source.read_bytes() == before


def test_convert_can_round_to_another_dtype(tmp_path, models):
    output = tmp_path / "small.safetensors"
    assert main(["convert", str(models / "adapter.safetensors"), f"--output={output}", "--dtype=bfloat16"]) == 0
    assert {p.dtype for p in CharacterAdapter.from_file(output).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nobody to draw"),
        (["--reference", "gone.png"], r"No such file or directory: (.*/)?gone\.png$"),
        (["--reference", __file__], "is not a picture"),
        (["--character", "gone.safetensors"], "there is no file gone.safetensors"),
        (["--reference", recorded.PICTURE, "--scale", "0.5", "0.6"], "2 --scale for 1 characters"),
        (
            ["--reference", recorded.PICTURE, "--mask", recorded.PICTURE, "--mask", "b.png"],
            "2 --mask for 1 --reference",
        ),
        (["--reference", recorded.PICTURE, "--lora", "gone.safetensors:0.5"], "no LoRA file gone.safetensors"),
        (["--reference", recorded.PICTURE, "--adapter", "gone.bin"], "there is no file gone.bin"),
        (["--reference", recorded.PICTURE, "--save-character", "fox.png"], "ends in .safetensors"),
        (["--reference", recorded.PICTURE, "--output", "out.jpg"], "ends in .png"),
    ],
)
def test_errors_are_one_line_and_status_2(generate, capsys, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _ = generate(*arguments)
    assert status == 2
    assert re.search(message, error_line(capsys))
    assert not (tmp_path / "out.png").exists()


# FLUX in files of its own


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory) -> Path:
    """A ComfyUI's folder: its vocabularies, and in its models folder FLUX in single files and as a diffusers folder."""
    comfyui = tmp_path_factory.mktemp("files") / "ComfyUI"
    parts = {**tiny.tiny_components(), "transformer": recorded.transformer()}
    InstantCharacterPipeline(**parts).save_pretrained(comfyui / "models/diffusers/flux")
    for name, part in SINGLE_FILES.items():
        parts[part].save_pretrained(comfyui / "models" / name)
    for folder, tokenizer in zip(TOKENIZERS, ("tokenizer", "tokenizer_2")):
        parts[tokenizer].save_pretrained(comfyui / folder)
    (comfyui / "custom_nodes").mkdir()
    recorded.adapter().save(comfyui / "models/adapter.safetensors")
    return comfyui


SINGLE_FILES = {"model": "transformer", "clip-l": "text_encoder", "t5": "text_encoder_2", "vae": "vae"}
"""By their option: the parts of a pipeline."""


@pytest.fixture
def flux_files(comfyui) -> dict[str, str]:
    """The options for FLUX in files of its own."""
    return {f"--{name}": str(next((comfyui / "models" / name).glob("*.safetensors"))) for name in SINGLE_FILES}


@pytest.fixture
def draw(comfyui, tmp_path, monkeypatch):
    """Runs ``generate`` with the recorded adapter, elsewhere; returns the exit status and the picture's path."""
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


def test_flux_in_single_files_draws_what_its_folder_does(draw, comfyui, flux_files):
    status, output = draw({"--model": str(comfyui / "models/diffusers/flux")})
    assert status == 0
    expected = Image.open(output).copy()
    output.unlink()
    assert draw(flux_files)[0] == 0
    difference = ImageChops.difference(Image.open(output), expected)
    assert max(high for _, high in difference.getextrema()) <= 1  # weights elsewhere in memory are summed otherwise
    assert json.loads(Image.open(output).text["instantcharacter"])["model"] == Path(flux_files["--model"]).name


def test_single_files_go_with_a_folder_of_flux(draw, comfyui, flux_files):
    flux = {"--model": str(comfyui / "models/diffusers/flux"), "--vae": flux_files["--vae"]}
    assert draw(flux)[0] == 0


@pytest.mark.parametrize("missing", ["--clip-l", "--t5", "--vae"])
def test_flux_in_a_file_of_its_own_asks_for_the_others(draw, flux_files, capsys, missing, no_models):
    del flux_files[missing]
    assert draw(flux_files)[0] == 2
    assert error_line(capsys).endswith(f"is FLUX alone: give {missing} FILE too")


@pytest.mark.parametrize("gone", ["--model", "--clip-l", "--t5", "--vae"])
def test_flux_file_that_is_not_there_is_said_first(draw, flux_files, capsys, gone, no_models):
    assert draw({**flux_files, gone: "gone.safetensors"})[0] == 2
    assert "file gone.safetensors" in error_line(capsys)


def test_files_beside_a_hub_id_are_refused(draw, flux_files, capsys, no_models):
    assert draw({**flux_files, "--model": "black-forest-labs/FLUX.1-dev"})[0] == 2
    assert error_line(capsys).endswith("--clip-l, --t5, --vae: only with --model FILE or FOLDER")


def test_without_a_comfyui_the_vocabularies_come_from_the_hub(draw, comfyui, flux_files, tmp_path, capsys, monkeypatch):
    fetched = []

    def fetch(repo: str, file: str) -> str:
        fetched.append((repo, file))
        folder = file.split("/")[0]
        shutil.copytree(comfyui / TOKENIZERS[folder == "tokenizer_2"], tmp_path / folder, dirs_exist_ok=True)
        return str(tmp_path / file)

    monkeypatch.setattr(model_folders, "comfyui_folder", lambda *_: None)
    status, _ = draw(flux_files)
    assert status == 2
    assert "come with ComfyUI, and this runs in none" in error_line(capsys)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    assert draw(flux_files)[0] == 0
    assert fetched == [("black-forest-labs/FLUX.1-dev", file) for file in model_folders.HUB_TOKENIZERS]


# The device


@pytest.mark.parametrize(
    ("there", "named", "device"),
    [
        ({"mps"}, None, "mps"),
        ({"cuda"}, None, "cuda"),
        (set(), None, "cpu"),
        ({"cuda"}, "cpu", "cpu"),
        ({"mps"}, "cpu", "cpu"),
    ],
)
def test_device_is_the_one_there_is(monkeypatch, there, named, device):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    options = Namespace(device=named, dtype=None)
    assert command_line._device(options) == torch.device(device)
    assert command_line._dtype(options) == (torch.float32 if device == "cpu" else torch.bfloat16)


# What is written over


@pytest.fixture
def no_models(monkeypatch):
    """Fails the test if a model is loaded: what is refused is refused before."""
    for model in (CharacterEncoder, CharacterAdapter, InstantCharacterPipeline):
        for name in {"from_file", "from_pretrained"} & set(dir(model)):
            monkeypatch.setattr(model, name, lambda *_, **__: pytest.fail("a model was loaded"))


@pytest.mark.parametrize("taken_by", ["adapter", "text", "folder"])
@pytest.mark.parametrize("command", ["encode", "generate"])
def test_character_replaces_nothing_but_a_character(
    generate, encoders, models, tmp_path, capsys, no_models, command, taken_by
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
    assert refused in error_line(capsys)
    assert before is None or path.read_bytes() == before


@pytest.mark.parametrize("there", ["character", "empty"])
def test_character_replaces_a_character_or_an_empty_file(encoders, tmp_path, there):
    path = tmp_path / "fox.safetensors"
    if there == "empty":
        path.touch()
    else:
        Character(torch.zeros(1, 4, 80), "0" * 32).save(path)
    assert main(["encode", f"--reference={recorded.PICTURE}", f"--output={path}", *encoders]) == 0
    assert Character.load(path).fingerprint != "0" * 32


def test_character_is_not_saved_over_one_that_is_drawn(generate, tmp_path, capsys, no_models):
    fox = tmp_path / "fox.safetensors"
    Character(torch.zeros(1, 4, 80), "0" * 32).save(fox)
    status, _ = generate("--reference", recorded.PICTURE, "--character", fox, "--save-character", fox)
    assert status == 2
    assert "fox.safetensors is what the picture is made of" in error_line(capsys)


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
    generate, tmp_path, capsys, monkeypatch, no_models, command, taken_by, message
):
    monkeypatch.setattr("instantcharacter.cli.demo.draw_demo", lambda *_: pytest.fail("the sheet was drawn"))
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
    assert message in error_line(capsys)
    assert before is None or path.read_bytes() == before


def test_picture_replaces_the_picture_before_it(generate, tmp_path):
    for _ in range(2):
        assert generate("--reference", recorded.PICTURE)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.png"]


def test_trial_of_the_output_touches_no_file(generate, tmp_path, capsys):
    mine = tmp_path / ".out.png.trial"
    mine.write_text("mine")
    assert generate("--character", "gone.safetensors")[0] == 2
    assert generate("--reference", recorded.PICTURE, "--lora", "gone.safetensors")[0] == 2
    assert generate("--reference", recorded.PICTURE)[0] == 0
    assert mine.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.png.trial", "out.png"]


def test_name_that_is_too_long_to_be_written_is_refused_first(generate, tmp_path, capsys, no_models):
    status, _ = generate("--reference", recorded.PICTURE, "--output", tmp_path / f"{'a' * 248}.png")
    assert status == 2
    assert "File name too long" in error_line(capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        "--size 100x100",
        "--size big",
        "--steps 0",
        "--scale nan",
        "--guidance -1",
        "--seed -1",
        "--lora a:nan",
        "--fit x",
    ],
)
def test_impossible_settings_are_status_2(generate, arguments):
    with pytest.raises(SystemExit) as stop:
        generate("--reference", recorded.PICTURE, *arguments.split())
    assert stop.value.code == 2


@pytest.mark.parametrize("command", ["generate", "encode"])
@pytest.mark.parametrize("option", ["--siglip", "--dinov2", "--adapter"])
@pytest.mark.parametrize("typed", ["gone.safetensors", "./gone", "models/gone/here", "gone", "", "models\\gone"])
def test_model_that_is_nowhere_is_said_before_others_are_loaded(
    generate, tmp_path, capsys, monkeypatch, no_models, command, option, typed
):
    monkeypatch.chdir(tmp_path)
    if command == "generate":
        assert generate("--reference", recorded.PICTURE, option, typed)[0] == 2
    else:
        assert main(["encode", "--reference", str(recorded.PICTURE), option, typed, "--output", "fox.safetensors"]) == 2
    assert re.fullmatch(rf"error: there is no file .*{re.escape(repr(typed)[1:-1])}.*\({option}\)", error_line(capsys))


@pytest.mark.parametrize("option", ["--siglip", "--dinov2", "--model"])
def test_repository_that_cannot_be_had_is_named(generate, capsys, option):
    assert generate("--reference", recorded.PICTURE, option, "nobody/nothing")[0] == 2
    assert error_line(capsys).startswith("error: nobody/nothing could not be had: ")


@pytest.mark.parametrize("option", ["--reference", "--mask", "--character", "--lora"])
@pytest.mark.parametrize("typed", ["gone.png", "/", "", "x" * 300])
def test_file_that_is_not_there_is_one_line(generate, capsys, no_models, option, typed):
    reference = () if option == "--reference" else ("--reference", recorded.PICTURE)
    assert generate(*reference, option, typed)[0] == 2
    assert error_line(capsys)


def test_adapter_is_found_in_its_folder(generate, models, tmp_path):
    _, output = generate("--reference", recorded.PICTURE)
    expected = Image.open(output).tobytes()
    CharacterAdapter.from_file(models / "adapter.safetensors").save(tmp_path / "ip/instantcharacter_ip-adapter.bin")
    (tmp_path / "ip/instantcharacter_ip-adapter.json").write_text(json.dumps(asdict(tiny.ADAPTER)))
    assert generate("--reference", recorded.PICTURE, "--adapter", tmp_path / "ip")[0] == 0
    assert Image.open(output).tobytes() == expected


def test_verbose_shows_the_traceback(generate, capsys):
    status, _ = generate("--reference", "gone.png", "--verbose")
    printed = capsys.readouterr().err
    assert status == 2
    assert "Traceback" in printed
    assert "error: " in printed


def test_cancelling_is_status_130(generate, monkeypatch, capsys):
    def cancel(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(InstantCharacterPipeline, "from_pretrained", cancel)
    status, output = generate("--reference", recorded.PICTURE)
    assert status == 130
    assert "Traceback" not in capsys.readouterr().err
    assert not output.exists()


def test_unreachable_hub_says_what_to_fetch(generate, capsys):
    status, _ = generate("--reference", recorded.PICTURE, "--adapter", "nobody/nothing")
    assert status == 2
    assert "Fetch it by hand from https://huggingface.co/nobody/nothing" in error_line(capsys)


def test_it_works_without_progress_bars(models, tmp_path, monkeypatch):
    monkeypatch.setattr("instantcharacter.model.adapter.RELEASED", tiny.ADAPTER)
    disable_progress_bars()
    try:
        output = tmp_path / "converted.safetensors"
        assert main(["convert", str(models / "adapter.safetensors"), f"--output={output}"]) == 0
        assert output.is_file()
    finally:
        enable_progress_bars()


def test_help_needs_no_heavy_import():
    code = (
        "import sys\n"
        "from instantcharacter.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
