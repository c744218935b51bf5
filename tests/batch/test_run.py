from __future__ import annotations

import json

import pytest
from support import batch_jobs, recorded

from instantcharacter.batch.jobs import read_jobs
from instantcharacter.batch.run import generate_batch
from instantcharacter.cli.main import main


@pytest.fixture
def rows():
    kinds = [{"size": 64}, {"size": 32}, {"size": 64, "true_cfg": 2, "negative_prompt": "snow"}]
    return [{"prompt": f"picture {i % 5}", **kinds[i % 3]} for i in range(23)]


def never() -> None:
    pytest.fail("FLUX was loaded")


def test_every_picture_is_generated_and_listed(rows, jobs_of, fake, tmp_path):
    jobs = jobs_of(*rows)
    entries = generate_batch(jobs, tmp_path / "out", lambda: fake, batch_size=4)
    assert [entry["line"] for entry in entries] == list(range(1, 24))
    assert [entry["seed"] for entry in entries] == list(range(23))
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {job.output for job in jobs}
    assert sorted(fake.batches) == [3, 4, 4, 4, 4, 4]
    written = (tmp_path / "out/pictures.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == entries
    assert "23 of 23 pictures" in (tmp_path / "out/index.html").read_text()


def test_characters_and_prompts_are_encoded_once(rows, jobs_of, fake, tmp_path):
    generate_batch(jobs_of(*rows), tmp_path / "out", lambda: fake, batch_size=4)
    assert fake.created == 1
    assert sorted(fake.encoded) == [*(f"picture {i}" for i in range(5)), "snow"]


def test_a_finished_job_loads_nothing(rows, jobs_of, fake, tmp_path):
    jobs = jobs_of(*rows)
    entries = generate_batch(jobs, tmp_path / "out", lambda: fake)
    assert generate_batch(jobs, tmp_path / "out", never) == entries
    assert not list((tmp_path / "out/.cache").glob("prompts"))


@pytest.mark.parametrize("moment", range(6))
def test_an_interrupted_job_goes_on_to_the_same_pictures(rows, jobs_of, fake, tmp_path, moment):
    jobs = jobs_of(*rows)
    generate_batch(jobs, tmp_path / "whole", lambda: fake, batch_size=4)
    fake.batches.clear()

    def interrupt(number: int) -> None:
        if number == moment:
            raise KeyboardInterrupt

    fake.on_call = interrupt
    with pytest.raises(KeyboardInterrupt):
        generate_batch(jobs, tmp_path / "out", lambda: fake, batch_size=4)
    before = batch_jobs.contents(tmp_path / "out")
    assert len(before) == sum(fake.batches)
    fake.on_call = lambda number: None
    encoded = len(fake.encoded)
    generate_batch(jobs, tmp_path / "out", lambda: fake)
    assert batch_jobs.contents(tmp_path / "out") == batch_jobs.contents(tmp_path / "whole")
    assert len(fake.batches) == 6
    assert len(fake.encoded) == encoded


def test_a_missing_picture_is_generated_in_the_batch_that_it_was_in(rows, jobs_of, fake, tmp_path):
    jobs = jobs_of(*rows)
    generate_batch(jobs, tmp_path / "out", lambda: fake, batch_size=4)
    before = batch_jobs.contents(tmp_path / "out")
    (tmp_path / "out/0004.png").unlink()
    fake.batches.clear()
    generate_batch(jobs, tmp_path / "out", lambda: fake)
    assert fake.batches == [4]
    assert batch_jobs.contents(tmp_path / "out") == before


def test_lines_can_be_added_but_not_changed(rows, jobs_of, fake, tmp_path):
    generate_batch(jobs_of(*rows[:5]), tmp_path / "out", lambda: fake)
    before = batch_jobs.contents(tmp_path / "out")
    entries = generate_batch(jobs_of(*rows[:7]), tmp_path / "out", lambda: fake)
    assert len(entries) == 7
    assert before.items() <= batch_jobs.contents(tmp_path / "out").items()
    with pytest.raises(ValueError, match=r"has 1 pictures that these lines did not make: 0002.png \(line 2\)"):
        generate_batch(jobs_of(rows[0], {**rows[1], "seed": 9}, *rows[2:7]), tmp_path / "out", never)


def test_other_settings_are_another_job(rows, jobs_of, fake, tmp_path):
    jobs = jobs_of(*rows[:2])
    generate_batch(jobs, tmp_path / "out", lambda: fake, batch_size=2, settings={"model": "dev"})
    for settings, message in (
        ({"settings": {"model": "schnell"}}, "model was dev, and is schnell"),
        ({"settings": {"model": "dev"}, "fit": "stretch"}, "fit was pad, and is stretch"),
        ({"settings": {"model": "dev"}, "cache_threshold": 0.1}, "cache was 0.0, and is 0.1"),
        ({"settings": {"model": "dev"}, "batch_size": 3}, "has batches of 2, and stays with them"),
        ({"settings": {"model": "dev"}, "batch_size": 0}, "batch_size is 0; expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            generate_batch(jobs, tmp_path / "out", never, **settings)


def test_a_folder_with_pictures_of_others_is_refused_and_left_as_it_is(rows, jobs_of, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/0002.png").write_bytes(recorded.PICTURE.read_bytes())
    with pytest.raises(ValueError, match="0002.png"):
        generate_batch(jobs_of(*rows[:2]), tmp_path / "out", never)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0002.png"]


def test_what_fails_is_listed_and_tried_again(rows, jobs_of, fake, tmp_path):
    jobs = jobs_of(*rows[:6])

    def fail(number: int) -> None:
        if number == 1:
            raise RuntimeError("no luck\nin detail")

    fake.on_call = fail
    entries = generate_batch(jobs, tmp_path / "out", lambda: fake, batch_size=1)
    failed = [entry for entry in entries if "error" in entry]
    assert len(entries) == 6
    assert [entry["error"] for entry in failed] == ["no luck"] * 5  # batches counts those that went well
    fake.on_call = lambda number: None
    assert not [e for e in generate_batch(jobs, tmp_path / "out", lambda: fake) if "error" in e]


def test_a_character_that_cannot_be_made_fails_its_lines_alone(jobs_of, fake, tmp_path):
    (tmp_path / "fox.png").write_bytes(recorded.PICTURE.read_bytes() + b" ")
    jobs = jobs_of({"prompt": "a", "reference": "fox.png"}, {"prompt": "b"})
    (tmp_path / "fox.png").unlink()
    first, second = generate_batch(jobs, tmp_path / "out", lambda: fake)
    assert "No such file or directory" in first["error"]
    assert "error" not in second


def test_the_good_lines_of_many_are_generated(jobs_file, fake, tmp_path):
    rows = [{"prompt": "x"} if i % 33 != 5 or i > 990 else '{"prompt": ""}' for i in range(1000)]
    jobs, bad = read_jobs(jobs_file(*rows))
    assert len(bad) == 30
    assert len(generate_batch(jobs, tmp_path / "out", lambda: fake, batch_size=50)) == 970
    assert len(batch_jobs.contents(tmp_path / "out")) == 970


@pytest.mark.slow
def test_processes_that_are_killed_go_on_to_the_pictures_of_one(tmp_path):
    jobs = batch_jobs.write_jobs(tmp_path / "jobs.jsonl", 18)
    assert main(["batch", str(jobs), f"--output={tmp_path / 'one'}", *batch_jobs.TOY]) == 0
    batch_jobs.kill_at(batch_jobs.start(jobs, tmp_path / "several", 2), tmp_path / "several", 3)
    batch_jobs.finish(jobs, tmp_path / "several", 2)
    one, several = (batch_jobs.contents(tmp_path / name) for name in ("one", "several"))
    assert len(one) == 18
    assert one == several
    assert len(list((tmp_path / "several/.cache/characters").iterdir())) == 2
