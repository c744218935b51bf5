from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import recorded

from instantcharacter import InstantCharacterPipeline
from instantcharacter.cli.main import main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nobody to draw"),
        (["--reference", "gone.png"], r"No such file or directory: (.*/)?gone\.png$"),
        (["--reference", __file__], "is not a picture"),
        (["--character", "gone.safetensors"], "there is no file gone.safetensors"),
        (["--reference", recorded.PICTURE, "--scale", "0.5", "0.6"], "2 --scale for 1 characters"),
        (["--reference", recorded.PICTURE, "--scale=-1", "--scale-single=2"], "strength's start is -1.0; expected"),
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
def test_errors_are_one_line_and_status_2(generate, error_line, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _ = generate(*arguments)
    assert status == 2
    assert re.search(message, error_line())
    assert not (tmp_path / "out.png").exists()


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


@pytest.mark.parametrize("command", [["-m", "instantcharacter"], ["instantcharacter"]])
def test_without_arguments_help_is_printed(command):
    run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("usage: python -m instantcharacter")
    assert "generate" in run.stdout


def test_installed_command_prints_help_under_its_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/instantcharacter"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("usage: instantcharacter ")


def test_command_that_does_not_exist_is_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["paint"])
    assert stop.value.code == 2
    assert "invalid choice: 'paint'" in capsys.readouterr().err
