from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from support import recorded

from instantcharacter import Character, Strength
from instantcharacter.batch.jobs import foreign_characters, read_jobs

LORA = str(recorded.LORA)


@pytest.fixture
def folder(tmp_path, character):
    """A folder with a file of each kind, and of none."""
    shutil.copy(recorded.PICTURE, tmp_path / "fox.png")
    Image.open(recorded.PICTURE).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "owl.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "white.png")
    Image.new("L", (8, 8), 0).save(tmp_path / "black.png")
    (tmp_path / "words.png").write_text("words")
    (tmp_path / "cut.png").write_bytes(recorded.PICTURE.read_bytes()[:300])
    character.save(tmp_path / "fox.safetensors")
    Character(torch.zeros(1, 4, 80), "0" * 32).save(tmp_path / "stranger.safetensors")
    return tmp_path


def test_a_line_says_what_it_wants_and_the_rest_is_by_default(folder, jobs_of):
    row = {"prompt": "both", "reference": ["fox.png", "owl.png"], "scale": ["0.5", "1.2:0.9:0.6"], "size": "32x48"}
    row |= {"seed": 7, "steps": 4, "guidance": 2.5, "lora": f"{LORA}:0.5", "output": "one/both.png"}
    row |= {"region": ["white.png", None], "true_cfg": 2, "mask": "white.png|"}
    job, plain = jobs_of(row, {"prompt": "fox", "character": "fox.safetensors"}, steps=9)
    settings = job.settings
    assert (job.line, job.output, job.prompt, job.negative_prompt, job.seed) == (1, "one/both.png", "both", "", 7)
    assert (settings.size, settings.steps, settings.guidance, settings.true_cfg) == ((32, 48), 4, 2.5, 2.0)
    assert settings.scale == (0.5, Strength(1.2, 0.9, 0.6))
    assert [reference.picture.path for reference in settings.reference] == [folder / "fox.png", folder / "owl.png"]
    assert [bool(reference.mask) for reference in settings.reference] == [True, False]
    assert [bool(region) for region in settings.region] == [True, False]
    assert [(source.path, weight) for source, weight in settings.lora] == [(recorded.LORA, 0.5)]
    assert (plain.output, plain.seed, plain.negative_prompt) == ("0002.png", 1, None)
    assert (plain.settings.scale, plain.settings.steps, plain.settings.size) == ((0.9,), 9, (1024, 1024))
    assert [source.path for source in plain.settings.character] == [folder / "fox.safetensors"]


def test_csv_has_the_same_jobs(folder, jobs_of):
    jobs = jobs_of({"prompt": "a, b", "reference": ["fox.png", "owl.png"], "scale": [0.5, 0.9], "steps": 4})
    (folder / "jobs.csv").write_text('prompt,reference,scale,steps,size\n"a, b",fox.png|owl.png,0.5 | 0.9,4,\n')
    assert [replace(job, line=1) for job in read_jobs(folder / "jobs.csv")[0]] == jobs


def test_seeds_and_names_follow_from_the_row_and_the_first_seed(jobs_of):
    jobs = jobs_of({"prompt": "a"}, "", {"prompt": "b", "seed": 3}, {"prompt": "c"}, seed=100)
    assert [(job.line, job.output, job.seed) for job in jobs] == [
        (1, "0001.png", 100),
        (3, "0002.png", 3),
        (4, "0003.png", 102),
    ]


def test_files_are_known_by_their_content(folder, jobs_of):
    shutil.copy(folder / "fox.png", folder / "copy.png")
    one, copy, other = jobs_of(
        *({"prompt": "a", "seed": 1, "reference": f"{name}.png"} for name in ("fox", "copy", "owl"))
    )
    assert (one.settings, one.digest) == (copy.settings, copy.digest)
    assert one.settings != other.settings
    assert len({one.digest, other.digest, replace(one, prompt="b").digest, replace(one, seed=2).digest}) == 4


def test_a_line_with_characters_of_its_own_takes_none_of_the_defaults(folder, jobs_of):
    defaults = {"reference": (folder / "owl.png",), "mask": (folder / "white.png",)}
    own, other = jobs_of(
        {"prompt": "a", "character": "fox.safetensors"}, {"prompt": "b", "reference": "fox.png"}, **defaults
    )
    assert own.settings.reference == ()
    assert other.settings.reference[0].mask is None


FAULTS = {
    '{"prompt": "a fox"': "not JSON",
    '{"prompt": "a", "colour": "red"}': "unknown field colour: expected some of prompt, reference",
    '{"seed": 1}': "no prompt",
    '{"prompt": " "}': "prompt is empty",
    '{"prompt": 5}': "prompt is 5; expected a text",
    '{"prompt": "a", "reference": "gone.png"}': "No such file or directory: .*gone.png",
    '{"prompt": "a", "reference": "."}': "Is a directory|Permission denied",
    '{"prompt": "a", "reference": "words.png"}': "words.png is not a picture",
    '{"prompt": "a", "reference": "cut.png"}': "cut.png is not a whole picture",
    '{"prompt": "a", "reference": []}': "nobody to draw",
    '{"prompt": "a", "reference": ["fox.png", ""]}': "there is no|empty|Is a directory|Permission denied",
    '{"prompt": "a", "reference": [null]}': "reference has an empty value",
    '{"prompt": "a", "reference": {"path": "fox.png"}}': "expected a text",
    '{"prompt": "a", "character": "fox.png"}': "is cut off or not a safetensors file",
    '{"prompt": "a", "character": "gone.safetensors"}': "there is no file",
    '{"prompt": "a", "reference": "fox.png", "mask": "black.png"}': "the mask is empty",
    '{"prompt": "a", "reference": "fox.png", "mask": ["white.png", "white.png"]}': "2 mask for 1 references",
    '{"prompt": "a", "reference": "fox.png", "region": "black.png"}': "the mask is empty",
    '{"prompt": "a", "reference": ["fox.png", "owl.png"], "region": "white.png"}': "1 region for 2 characters",
    '{"prompt": "a", "reference": "fox.png", "scale": [1, 2]}': "2 --scale for 1 characters",
    '{"prompt": "a", "reference": "fox.png", "scale": NaN}': "scale 'nan': expected a number, -10 to 10",
    '{"prompt": "a", "reference": "fox.png", "scale": "1:2"}': "scale 1:2: expected one number",
    '{"prompt": "a", "reference": "fox.png", "scale": true}': "scale is True; expected a number or a text",
    '{"prompt": "a", "reference": "fox.png", "size": "100x100"}': "size '100x100': expected WIDTHxHEIGHT",
    '{"prompt": "a", "reference": "fox.png", "steps": 2.5}': "steps '2.5': expected a whole number",
    '{"prompt": "a", "reference": "fox.png", "seed": -1}': "seed '-1': expected a whole number, 0 to",
    '{"prompt": "a", "reference": "fox.png", "guidance": 1e999}': "guidance 'inf': expected a number, 0 to 100",
    '{"prompt": "a", "reference": "fox.png", "negative_prompt": "snow"}': "negative_prompt does nothing at true_cfg 1",
    '{"prompt": "a", "reference": "fox.png", "lora": "gone.safetensors:0.5"}': "there is no file .*gone.safetensors",
    '{"prompt": "a", "reference": "fox.png", "lora": "fox.png"}': "fox.png is cut off or not a",
    f'{{"prompt": "a", "reference": "fox.png", "lora": ["{LORA}:1", "{LORA}:2"]}}': "a LoRA twice",
    '{"prompt": "a", "reference": "fox.png", "output": "a.jpg"}': "output a.jpg: expected a name in the output folder",
    '{"prompt": "a", "reference": "fox.png", "output": "0001.PNG"}': "expected a name in the output folder",
    '{"prompt": "a", "reference": "fox.png", "output": "/a.png"}': "expected a name in the output folder",
    '{"prompt": "a", "reference": "fox.png", "output": "one/../../a.png"}': "expected a name in the output folder",
    '{"prompt": "a", "reference": "fox.png", "output": "a\\\\b.png"}': "expected a name in the output folder",
    '{"prompt": "a", "reference": "fox.png", "output": ".cache/a.png"}': "expected a name in the output folder",
    '{"prompt": "a", "reference": "fox.png", "output": "a.png/b.png"}': "expected a name in the output folder",
    '{"prompt": "a", "reference": "fox.png", "output": "0001.png"}': "0001.png is the output of line 1, too",
}
"""Bad lines, and what is said of each."""


@pytest.mark.parametrize("line", FAULTS)
def test_a_bad_line_is_found_and_the_others_are_read(folder, jobs_file, line):
    jobs, bad = read_jobs(jobs_file({"prompt": "first"}, line, {"prompt": "last"}))
    assert [(job.prompt, job.line, job.output) for job in jobs] == [("first", 1, "0001.png"), ("last", 3, "0003.png")]
    ((number, fault),) = bad
    assert number == 2
    assert fault == fault.splitlines()[0]
    assert re.search(FAULTS[line], fault), fault


def test_names_that_differ_in_case_or_form_are_one_file_on_some_systems(jobs_file):
    rows = [{"prompt": "a", "output": name} for name in ("Fox.png", "fox.png", "\u00e9.png", "e\u0301.png")]
    _, bad = read_jobs(jobs_file(*rows))
    assert [line for line, _ in bad] == [2, 4]


def test_all_bad_lines_of_many_are_found(folder, jobs_file):
    ten = list(FAULTS)[::4][:10]
    rows = [ten[i // 33 % 10] if i % 33 == 5 and i < 990 else {"prompt": f"picture {i}"} for i in range(1000)]
    jobs, bad = read_jobs(jobs_file(*rows))
    assert len(ten) == 10
    assert (len(jobs), len(bad)) == (970, 30)
    assert [line for line, _ in bad] == [i + 1 for i, row in enumerate(rows) if isinstance(row, str)]


def test_a_file_without_lines_is_refused(jobs_file):
    with pytest.raises(ValueError, match="has no lines"):
        read_jobs(jobs_file("", " "))


def test_characters_of_another_adapter_are_bad_lines(folder, jobs_of, adapter):
    jobs = jobs_of(
        {"prompt": "a", "character": "fox.safetensors"}, {"prompt": "b", "character": "stranger.safetensors"}
    )
    ((line, fault),) = foreign_characters(jobs, adapter.fingerprint())
    assert line == 2
    assert "made by adapter 0000" in fault


def test_json_numbers_are_read_as_they_are_written(jobs_of):
    big = 2**64 - 1
    (job,) = jobs_of(json.dumps({"prompt": "a", "seed": big, "size": 64, "reference": str(recorded.PICTURE)}))
    assert (job.seed, job.settings.size) == (big, (64, 64))
