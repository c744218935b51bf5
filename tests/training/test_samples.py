from __future__ import annotations

import gc
import io
import json
import re
import tarfile
import unicodedata
import warnings
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
import training_world as world
from PIL import Image

from instantcharacter.training import Source, TrainingConfig, read_config
from instantcharacter.training.examples import Examples, _squares
from instantcharacter.training.samples import BadSample, Sample, Samples, Tally

STAGES = Path(__file__).parents[2] / "instantcharacter/training/stages"


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
        ('{"file_name": "a.png", "text": "\\ud83d"}', "half a letter in the text"),
        ('{"file_name": "a.png", "text": "a", "reference": null}', "no reference"),
        ('{"text": "a"}', "metadata.jsonl line 1: no picture, the line has no file_name"),
        ('{"file_name": 1}', "metadata.jsonl line 1: no picture, the line has no file_name"),
        ("{cut off", "metadata.jsonl line 1: no picture, the line is not JSON"),
        ("[" * 10_000, "metadata.jsonl line 1: no picture, the line is not JSON"),
        ("[]", "metadata.jsonl line 1: no picture, the line has no file_name"),
        ('{"file_name": "a.png", "text": "a"}', "no reference"),
    ],
)
def test_a_bad_row_says_what_is_wrong_with_it(tmp_path, line, reason):
    (tmp_path / "metadata.jsonl").write_text(line)
    first, second = islice(Samples([Source(str(tmp_path), pairs=True)], 0).from_position(0), 2)
    assert isinstance(first, BadSample) and reason in str(first)
    assert str(second) == str(first)  # a line is one sample


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_metadata_is_read_in_every_encoding_that_json_has(tmp_path, encoding, end):
    rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(("ü 名", "a\u2028b", "a\x85b"))]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "metadata.jsonl").write_bytes(end.join([*lines, "", ""]).encode(encoding))
    assert sorted(texts(Source(str(tmp_path)), 3)) == sorted(row["text"] for row in rows)


def test_metadata_in_another_encoding_says_which_line(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes('{"file_name": "a.png"}\n{"file_name": "ü.png"}'.encode("cp1252"))
    with pytest.raises(ValueError, match=r"metadata.jsonl is not in utf-8 at line 2 .*: save it in UTF-8"):
        Samples([Source(str(tmp_path))], 0)


def test_names_written_on_another_system_are_found(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("b.JPG", unicodedata.normalize("NFC", "ünï 名.png"), "c.png", "C.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)

    def picture(name):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a"}))
        (sample,) = islice(Samples([Source(str(tmp_path))], 0).from_position(0), 1)
        return sample.picture.relative_to(tmp_path) if isinstance(sample, Sample) else str(sample)

    for name in ("images/b.JPG", "images\\b.JPG", "Images/B.jpg", "IMAGES\\b.jpg", "images\\..\\images\\b.jpg"):
        assert (tmp_path / picture(name)).samefile(tmp_path / "images/b.JPG")
    assert picture(unicodedata.normalize("NFD", "images/ünï 名.PNG")).name == unicodedata.normalize("NFC", "ünï 名.png")
    assert picture("images/c.png") == Path("images/c.png")
    for name in ("images/d.png", "nowhere/b.JPG", "a\0/b.png", "\ud800.png"):  # reading them says what is wrong
        assert picture(name) == Path(name)
    if not (tmp_path / "IMAGES").exists():  # a disk that tells cases apart
        assert "images/c.PNG is not there, and may be any of C.png, c.png" in picture("images/c.PNG")
        assert picture("images/new.png") == Path("images/new.png")
        (tmp_path / "images/NEW.png").touch()
        assert picture("images/new.png") == Path("images/NEW.png")  # what was listed before is not taken for all


def test_bad_samples_are_skipped_and_counted(tmp_path):
    source = numbered(tmp_path / "pictures", 150)
    (tmp_path / "pictures/77.png").write_bytes(b"not a picture")
    examples = without_models(tmp_path, source)
    batches = examples.batches(0)
    positions = [next(batches)[1] for _ in range(15)]
    assert len(examples.tally.bad) == 1
    assert "77.png" in examples.tally.bad[0]
    assert positions[-1] == 151


def without_models(tmp_path, source):
    """Examples of a source that only read and decode."""
    config = world.config(tmp_path, tmp_path / "output", data=(source,), batch_size=10)
    examples = Examples(config, torch.device("cpu"))
    for computed in (examples._latents, examples._texts, examples._features):
        computed._compute = lambda prepared: [dict.fromkeys(NAMES, torch.zeros(1)) for _ in prepared]
        computed._folder = None
    return examples


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


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (OSError(5, "Input/output error"), "Input/output error"),
    ],
)
def test_a_picture_that_cannot_be_read_is_bad_and_not_fatal(tmp_path, monkeypatch, caplog, error, named):
    source = numbered(tmp_path / "pictures", 150)
    read = Path.read_bytes

    def refused(path):
        if path.name == "7.png":
            raise error
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    examples = without_models(tmp_path, source)
    batches = examples.batches(0)
    for _ in range(29):
        next(batches)
    assert [named in bad for bad in examples.tally.bad] == [True, True]  # once in each of two epochs
    assert [record.message for record in caplog.records] == [f"skipped {examples.tally.bad[0]}"]


def test_a_folder_by_a_picture_s_name_is_bad_and_not_fatal(tmp_path):
    source = numbered(tmp_path / "pictures", 1)
    (tmp_path / "pictures/0.png").unlink()
    (tmp_path / "pictures/0.png").mkdir()
    (sample,) = islice(Samples([source], 0).from_position(0), 1)
    with pytest.raises(BadSample, match=r"0.png"):
        without_models(tmp_path, source)._begin(sample)


def test_a_broken_picture_of_a_shard_is_bad_and_not_fatal(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    whole = png("red")
    for data, reason in (
        (b"", "not a picture that can be read"),
        (b"text", "not a picture that can be read"),
        (whole[:-30], "not a whole picture"),
        (whole, "exceeds limit of 20 pixels"),
    ):
        with pytest.raises(BadSample, match=reason):
            without_models(tmp_path, numbered(tmp_path / "p", 1))._begin(Sample("name", data, "text", data))


def test_no_file_of_a_picture_stays_open(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "0.tif", save_all=True, append_images=frames[1:])
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        assert _squares(tmp_path / "0.tif").shape[0] == 5
        gc.collect()
    assert not [str(warning.message) for warning in noted if warning.category is ResourceWarning]


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
        ("learning_rate: -1e-4", "learning_rate is -0.0001; expected 0 or more"),
        ("learning_rate: .nan", "learning_rate is nan; expected 0 or more"),
        ("learning_rate: 1" + 400 * "0", "expected float"),
        ("weight_decay: -1", "weight_decay is -1.0; expected 0 or more"),
        ("weight_decay: .inf", "weight_decay is inf; expected 0 or more"),
        ("warmup: -1", "warmup is -1; expected 0 or more"),
        ("clip: 0", "clip is 0.0; expected more than 0"),
        ("clip: .nan", "clip is nan; expected more than 0"),
        ("guidance: .nan", "guidance is nan; expected 0 or more"),
        ("held_gib: -1", "held_gib is -1.0; expected 0 or more"),
        ("held_gib: .inf", "held_gib is inf; expected 0 or more"),
        ("ema: .nan", "ema is nan; expected 0 or more, and less than 1"),
        ("preview_steps: 0", "preview_steps is 0; expected at least 1"),
        ("seed: -1", "seed is -1; expected 0 to 2**64 - 1"),
        ("seed: 18446744073709551616", "seed is 18446744073709551616; expected 0 to 2**64 - 1"),
        ("data: [{path: p, share: -1}]", "c.yaml: data 0: share is -1.0; expected 0 or more"),
        ("data: [{path: p, share: .nan}]", "share is nan; expected 0 or more"),
        ("data: [{path: p, share: 0}]", "all sources have a share of 0"),
    ],
)
def test_a_config_that_cannot_be_meant_says_why(tmp_path, change, message):
    told = {"output": "o", "data": "[{path: p}]"} | dict([change.split(": ", 1)])
    (tmp_path / "c.yaml").write_text("\n".join(f"{key}: {value}" for key, value in told.items()))
    with pytest.raises(ValueError, match=re.escape(message)):
        read_config(tmp_path / "c.yaml")


def test_a_config_needs_an_output_and_yaml(tmp_path):
    path = tmp_path / "c.yaml"
    for text, message in (("data: [{path: p}]", "output is missing"), ("{", "is not YAML"), ("3", "expected settings")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_config(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_config_is_read_as_windows_saves_it(tmp_path, encoding):
    (tmp_path / "c.yaml").write_bytes("output: ü\r\ndata: [{path: p}]\r\n".encode(encoding))
    assert read_config(tmp_path / "c.yaml").output == Path("ü")


def test_numbers_are_read_as_people_write_them(tmp_path):
    (tmp_path / "c.yaml").write_text("output: o\ndata: [{path: p, share: 2}]\nlearning_rate: 1e-4\nadapter: a.bin\n")
    config = read_config(tmp_path / "c.yaml")
    assert config == TrainingConfig(Path("o"), (Source("p", share=2.0),), learning_rate=1e-4, adapter=Path("a.bin"))
