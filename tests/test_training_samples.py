from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
import training_world as world
from PIL import Image

from instantcharacter.training import Source, TrainingConfig, read_config
from instantcharacter.training.examples import Examples
from instantcharacter.training.samples import BadSample, Samples, Tally

STAGES = Path(__file__).parent.parent / "instantcharacter/training/stages"


def folder(path, rows):
    path.mkdir(exist_ok=True)
    for row in rows:
        for name in (row.get("file_name"), row.get("reference")):
            if name:
                Image.new("RGB", (8, 8), "red").save(path / name)
    (path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return Source(str(path))


def numbered(path, count, **more):
    return folder(path, [{"file_name": f"{i}.png", "text": f"text {i}", **more} for i in range(count)])


def texts(source, count, position=0, seed=0):
    samples = Samples([source] if isinstance(source, Source) else source, seed).from_position(position)
    return [sample.text for sample in islice(samples, count)]


def tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def png(colour):
    data = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(data, "PNG")
    return data.getvalue()


def test_every_epoch_has_every_sample_in_another_order(tmp_path):
    source = numbered(tmp_path / "a", 8)
    both = texts(source, 16)
    assert sorted(both[:8]) == sorted(both[8:]) == [f"text {i}" for i in range(8)]
    assert both[:8] != both[8:]
    assert texts(source, 16) == both
    assert texts(source, 16, seed=1) != both


def test_samples_go_on_from_any_position(tmp_path):
    sources = [replace(numbered(tmp_path / "a", 5), share=3), numbered(tmp_path / "b", 3)]
    whole = texts(sources, 30)
    for position in (1, 7, 20):
        assert texts(sources, 30 - position, position) == whole[position:]


def test_sources_are_mixed_by_their_shares(tmp_path):
    one = folder(tmp_path / "a", [{"file_name": "a.png", "text": "a"}])
    other = folder(tmp_path / "b", [{"file_name": "b.png", "text": "b"}])
    drawn = texts([replace(one, share=3), other], 1000)
    assert 700 < drawn.count("a") < 800


def test_a_pair_has_its_reference_and_an_unpaired_sample_itself(tmp_path):
    source = folder(tmp_path / "a", [{"file_name": "a.png", "text": "a", "reference": "b.png"}])
    (unpaired,) = islice(Samples([source], 0).from_position(0), 1)
    (paired,) = islice(Samples([replace(source, pairs=True)], 0).from_position(0), 1)
    assert unpaired.reference == unpaired.picture == tmp_path / "a/a.png"
    assert (paired.picture, paired.reference) == (tmp_path / "a/a.png", tmp_path / "a/b.png")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"file_name": "a.png", "text": ""}', "no text"),
        ('{"file_name": "a.png"}', "no text"),
        ('{"file_name": "a.png", "text": 3}', "no text"),
        ('{"text": "a"}', "metadata.jsonl line 1: no picture"),
        ("{cut off", "metadata.jsonl line 1: no picture"),
        ("[]", "metadata.jsonl line 1: no picture"),
        ('{"file_name": "a.png", "text": "a"}', "no reference"),
    ],
)
def test_a_bad_row_says_what_is_wrong_with_it(tmp_path, line, reason):
    (tmp_path / "metadata.jsonl").write_text(line)
    (bad,) = islice(Samples([Source(str(tmp_path), pairs=True)], 0).from_position(0), 1)
    assert isinstance(bad, BadSample) and reason in str(bad)


def test_bad_samples_are_skipped_and_counted(tmp_path):
    source = numbered(tmp_path / "pictures", 150)
    (tmp_path / "pictures/77.png").write_bytes(b"not a picture")
    config = world.config(tmp_path, tmp_path / "output", data=(source,), batch_size=10)
    examples = Examples(config, torch.device("cpu"))
    for computed in (examples._latents, examples._texts, examples._features):
        computed._compute = lambda prepared: [dict.fromkeys(NAMES, torch.zeros(1)) for _ in prepared]
        computed._folder = None
    batches = examples.batches(0)
    positions = [next(batches)[1] for _ in range(15)]
    assert len(examples.tally.bad) == 1
    assert "77.png" in examples.tally.bad[0]
    assert positions[-1] == 151


NAMES = ("tokens", "prompt", "pooled", "low_res_shallow", "low_res_deep", "high_res_deep")


def test_more_than_one_bad_sample_in_a_hundred_stop_the_training():
    tally = Tally()
    for _ in range(98):
        tally.count()
    tally.count(BadSample("a.png: not a picture"))
    with pytest.raises(ValueError, match=r"2 of 100 samples are bad.*\na.png: not a picture\nb.png: gone"):
        tally.count(BadSample("b.png: gone"))


def test_a_missing_picture_is_bad_and_not_fatal(tmp_path):
    source = numbered(tmp_path / "pictures", 3)
    (tmp_path / "pictures/1.png").unlink()
    examples = Examples(world.config(tmp_path, tmp_path / "o", data=(source,)), torch.device("cpu"))
    with pytest.raises(BadSample, match="1.png"):
        for sample in islice(Samples([source], 0).from_position(0), 3):
            examples._begin(sample)


def test_a_source_that_is_not_there_says_so(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no metadata.jsonl"):
        Samples([Source(str(tmp_path / "empty"))], 0)
    (tmp_path / "empty/metadata.jsonl").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        Samples([Source(str(tmp_path / "empty"))], 0)


@pytest.mark.parametrize("stream", [False, True])
def test_webdataset_shards_are_read(tmp_path, stream, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for shard in range(2):
        files = {}
        for i in range(2):
            name = f"{shard}{i}"
            files |= {f"{name}.png": png("red"), f"{name}.reference.png": png("blue"), f"{name}.txt": name.encode()}
        tar(tmp_path / f"shard-{shard}.tar", files)
    source = Source(str(tmp_path / "shard-*.tar"), pairs=True, stream=stream)
    drawn = list(islice(Samples([source], 0).from_position(0), 8))
    assert sorted(sample.text for sample in drawn[:4]) == ["00", "01", "10", "11"]
    assert all(sample.picture == png("red") and sample.reference == png("blue") for sample in drawn)
    later = list(islice(Samples([source], 0).from_position(3), 5))
    assert later[0].text == drawn[3].text


def test_a_dataset_of_the_hub_s_kind_is_read(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = {"image": [{"bytes": png("red"), "path": None}] * 2, "text": ["a", "b"]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "hub/train.parquet")
    drawn = list(islice(Samples([Source(str(tmp_path / "hub"))], 0).from_position(0), 2))
    assert sorted(sample.text for sample in drawn) == ["a", "b"]
    assert drawn[0].picture == png("red")


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_the_stages_of_the_paper_can_be_read(stage):
    config = read_config(STAGES / f"{stage}.yaml")
    pairs = {source.pairs for source in config.data}
    assert pairs == {"stage1": {False}, "stage2": {True}, "stage3": {False, True}}[stage]
    assert (config.resolution > 512) == (stage == "stage3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stepz: 3", "no setting 'stepz'"),
        ("steps: many", "steps is 'many'; expected int"),
        ("steps: 0", "steps is 0; expected at least 1"),
        ("steps: true", "steps is True; expected int"),
        ("resolution: 500", "resolution is 500; expected a multiple of 16"),
        ("optimizer: sgd", "optimizer is 'sgd'; expected adamw or adamw8bit"),
        ("drop_text: 1.0", "drop_text is 1.0"),
        ("learning_rate: [1]", "learning_rate is"),
        ("data: []", "names no source"),
        ("data: pictures", "expected a list"),
        ("data: [{pairs: true}]", "data 0: path is missing"),
        ("sizes: {num_tokens: 0}", "num_tokens is 0"),
        ("cache: 3", "cache is 3; expected Path"),
    ],
)
def test_a_config_that_cannot_be_meant_says_why(tmp_path, change, message):
    told = {"output": "o", "data": "[{path: p}]"} | dict([change.split(": ", 1)])
    (tmp_path / "c.yaml").write_text("\n".join(f"{key}: {value}" for key, value in told.items()))
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        read_config(tmp_path / "c.yaml")


def test_a_config_needs_an_output_and_yaml(tmp_path):
    path = tmp_path / "c.yaml"
    for text, message in (("data: [{path: p}]", "output is missing"), ("{", "is not YAML"), ("3", "expected settings")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_config(path)


def test_numbers_are_read_as_people_write_them(tmp_path):
    (tmp_path / "c.yaml").write_text("output: o\ndata: [{path: p, share: 2}]\nlearning_rate: 1e-4\nadapter: a.bin\n")
    config = read_config(tmp_path / "c.yaml")
    assert config == TrainingConfig(Path("o"), (Source("p", share=2.0),), learning_rate=1e-4, adapter=Path("a.bin"))
