from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import recorded

from instantcharacter import Character, InstantCharacterPipeline
from instantcharacter.cli.main import main

FOX = {"prompt": "a fox", "reference": str(recorded.PICTURE)}


@pytest.fixture
def batch(models, encoders, tmp_path):
    """Runs ``batch`` with small settings on rows; returns the exit status and the folder."""

    def run(rows: list[dict | str], *arguments: object) -> tuple[int, Path]:
        jobs, output = tmp_path / "jobs.jsonl", tmp_path / "out"
        jobs.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        settings = [f"--output={output}", "--steps=2", "--size=48x32", f"--model={models / 'flux'}", *encoders]
        return main(["batch", str(jobs), *settings, *map(str, arguments)]), output

    return run


def test_lines_become_pictures_and_options_count_where_a_line_has_no_value(batch, capsys):
    rows = [FOX, {**FOX, "prompt": "an owl", "size": "32x48", "output": "owl.png", "seed": 7, "scale": "1.2:0.9:0.6"}]
    status, output = batch(rows, "--seed=5", "--guidance=2.5")
    assert status == 0
    first, second = (json.loads(line) for line in (output / "pictures.jsonl").read_text().splitlines())
    assert (first["output"], first["seed"], first["size"], first["guidance"]) == ("0001.png", 5, "48x32", 2.5)
    assert (second["output"], second["seed"], second["scale"]) == ("owl.png", 7, ["1.2:0.9:0.6"])
    assert Image.open(output / "owl.png").size == (32, 48)
    assert json.loads(Image.open(output / "0001.png").text["instantcharacter"])["model"] == "flux"
    assert capsys.readouterr().out.splitlines()[-1] == f"2 of 2 pictures are in {output / 'index.html'}"


def test_a_line_is_the_picture_of_generate(batch, generate):
    _, single = generate("--reference", recorded.PICTURE)
    status, output = batch([{**FOX, "seed": 5}])
    assert status == 0
    found, expected = (np.asarray(Image.open(path), dtype=int) for path in (output / "0001.png", single))
    assert np.abs(found - expected).max() <= 1


def test_every_bad_line_is_named_before_a_model_is_loaded(batch, no_models, capsys):
    rows = [FOX, {**FOX, "size": "10x10"}, '{"prompt": ', {**FOX, "reference": "gone.png"}, {**FOX, "steps": "many"}]
    status, output = batch(rows)
    printed = capsys.readouterr().err
    assert status == 2
    assert re.findall(r"jobs.jsonl:(\d):", printed) == ["2", "3", "4", "5"]
    assert "4 of 5 lines are bad, see above, and nothing is generated: mend them, or give --skip-bad" in printed
    assert not output.exists()


def test_good_lines_are_generated_if_bad_ones_are_to_be_skipped(batch, capsys):
    status, output = batch([FOX, {**FOX, "size": "10x10"}, {**FOX, "prompt": "an owl"}], "--skip-bad")
    printed = capsys.readouterr()
    assert status == 1
    assert [path.name for path in sorted(output.glob("*.png"))] == ["0001.png", "0003.png"]
    assert "jobs.jsonl:2: size '10x10': expected" in printed.err
    assert printed.out.endswith(f"2 of 3 pictures are in {output / 'index.html'}\n")


def test_a_character_of_another_adapter_is_a_bad_line(batch, tmp_path, capsys, monkeypatch):
    Character(torch.zeros(1, 4, 80), "0" * 32).save(tmp_path / "stranger.safetensors")
    monkeypatch.setattr(InstantCharacterPipeline, "from_pretrained", lambda *_, **__: pytest.fail("FLUX was loaded"))
    status, _ = batch([FOX, {"prompt": "a", "character": "stranger.safetensors"}])
    assert status == 2
    assert "jobs.jsonl:2: " in (printed := capsys.readouterr().err)
    assert "was made by adapter 0000" in printed


def test_a_line_that_fails_is_named_and_the_others_are_generated(batch, capsys, monkeypatch):
    call = InstantCharacterPipeline.__call__

    def fail(self, **settings):
        if settings["width"] == 64:
            raise torch.OutOfMemoryError("out of memory")
        return call(self, **settings)

    monkeypatch.setattr(InstantCharacterPipeline, "__call__", fail)
    status, output = batch([{**FOX, "size": 64}, FOX])
    assert status == 1
    assert "jobs.jsonl:1: 0001.png failed: out of memory" in capsys.readouterr().err
    assert [path.name for path in output.glob("*.png")] == ["0002.png"]


def test_a_second_run_of_a_finished_job_loads_no_flux_and_another_model_is_another_job(batch, capsys, monkeypatch):
    assert batch([FOX])[0] == 0
    monkeypatch.setattr(InstantCharacterPipeline, "from_pretrained", lambda *_, **__: pytest.fail("FLUX was loaded"))
    assert batch([FOX])[0] == 0
    status, _ = batch([FOX], "--dtype=bfloat16")
    assert status == 2
    assert "dtype was torch.float32, and is torch.bfloat16. Take another --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=gone"], "there is no file or folder 'gone'"),
        (["--clip-l=gone.safetensors"], "there is no file gone.safetensors"),
        (["--mask", recorded.PICTURE, "--mask", recorded.PICTURE, "--reference", recorded.PICTURE], "2 mask for 1"),
    ],
)
def test_options_are_checked_first(batch, no_models, capsys, arguments, message):
    status, output = batch([{"prompt": "a"}], *arguments)
    assert status == 2
    assert re.search(message, capsys.readouterr().err)
    assert not output.exists()


@pytest.mark.parametrize("arguments", [["--batch-size=0"], ["--true-cfg=0.5"], ["--seed=-1"], ["--prompt=a"]])
def test_impossible_options_are_status_2(batch, arguments):
    with pytest.raises(SystemExit) as stop:
        batch([FOX], *arguments)
    assert stop.value.code == 2
