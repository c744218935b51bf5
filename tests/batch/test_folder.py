from __future__ import annotations

import json

import pytest
from PIL import Image

from instantcharacter.batch.folder import OutputFolder

RED = Image.new("RGB", (16, 16), "red")


@pytest.fixture
def folder(tmp_path) -> OutputFolder:
    return OutputFolder(tmp_path / "out")


@pytest.fixture
def jobs(jobs_of):
    return jobs_of({"prompt": "a fox"}, {"prompt": "an owl", "output": "one/owl.png"}, {"prompt": "a cat"})


def test_a_job_goes_on_with_the_settings_that_it_began_with(folder):
    assert folder.open({"dtype": "bfloat16", "sizes": (1, 2)}) is None
    assert folder.choose_batch_size({"dtype": "bfloat16", "sizes": (1, 2)}, 3) == 3
    assert folder.open({"dtype": "bfloat16", "sizes": (1, 2)}) == 3
    with pytest.raises(ValueError, match="of another job: dtype was bfloat16, and is float32. Take another --output"):
        folder.open({"dtype": "float32", "sizes": (1, 2)})
    with pytest.raises(ValueError, match="sizes was .* is None"):
        folder.open({"dtype": "bfloat16"})


def test_a_picture_carries_its_settings_and_belongs_to_its_line(folder, jobs, jobs_of):
    folder.open({})
    for job in jobs[:2]:
        folder.save(job, RED, 1.5, {"model": "flux"})
    folder.check_pictures(jobs)
    assert [job.output for job in folder.present(jobs)] == ["0001.png", "one/owl.png"]
    settings = json.loads(Image.open(folder.path / "0001.png").text["instantcharacter"])
    assert settings["prompt"] == "a fox"
    assert (settings["seed"], settings["model"], settings["characters"]) == (0, "flux", ["reference.png"])
    with pytest.raises(ValueError, match=r"has 1 pictures that these lines did not make: 0001.png \(line 1\)"):
        folder.check_pictures(jobs_of({"prompt": "another fox"}, {"prompt": "an owl", "output": "one/owl.png"}))


def test_pictures_without_the_settings_of_their_job_are_refused(folder, jobs):
    folder.save(jobs[0], RED, 1.5, {})
    with pytest.raises(ValueError, match="that these lines did not make"):
        folder.check_pictures(jobs)


@pytest.mark.parametrize("content", [None, b"", b"words"])
def test_a_picture_of_nobody_is_not_taken_for_ours(folder, jobs, content):
    folder.open({})
    if content is None:
        RED.save(folder.path / "0001.png")
    else:
        (folder.path / "0001.png").write_bytes(content)
    with pytest.raises(ValueError, match="that these lines did not make"):
        folder.check_pictures(jobs)


def test_entries_are_of_pictures_that_are_there_and_of_lines_that_failed(folder, jobs, tmp_path):
    assert folder.entries(jobs) == []
    folder.save_error(jobs[0], "no luck")
    folder.save(jobs[0], RED, 2.0, {})
    folder.save_error(jobs[2], "no luck")
    other = OutputFolder(folder.path)  # another process
    other.save(jobs[1], RED, 1.0, {})
    entries = other.entries(jobs)
    assert [(e["line"], e.get("seconds"), e.get("error")) for e in entries] == [
        (1, 2.0, None),
        (2, 1.0, None),
        (3, None, "no luck"),
    ]
    folder.write_list(entries)
    assert [json.loads(line) for line in (folder.path / "pictures.jsonl").read_text().splitlines()] == entries


def test_half_a_line_of_a_killed_process_is_no_entry(folder, jobs):
    folder.save(jobs[0], RED, 2.0, {})
    (log,) = folder.cache.glob("*.jsonl")
    log.write_text(log.read_text() + '{"output": "0003.png", "sec')
    assert [entry["line"] for entry in folder.entries(jobs)] == [1]
