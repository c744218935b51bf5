from __future__ import annotations

import io
import json
import tarfile
import unicodedata
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image

from instantcharacter.training import Source
from instantcharacter.training.data.samples import BadSample, Sample, Samples


def folder(path, rows):
    """An image folder whose metadata has these rows."""
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


def test_samples_continue_from_any_position(tmp_path):
    sources = [replace(numbered(tmp_path / "a", 5), share=3), numbered(tmp_path / "b", 3)]
    whole = texts(sources, 30)
    for position in (1, 7, 20):
        assert texts(sources, 30 - position, position) == whole[position:]


def test_sources_are_mixed_by_their_shares(tmp_path):
    first = folder(tmp_path / "a", [{"file_name": "a.png", "text": "a"}])
    second = folder(tmp_path / "b", [{"file_name": "b.png", "text": "b"}])
    mixed = texts([replace(first, share=3), second], 1000)
    assert 700 < mixed.count("a") < 800


def test_a_pair_has_its_own_reference_and_an_unpaired_sample_its_picture(tmp_path):
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
def test_a_bad_row_names_its_error(tmp_path, line, reason):
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


def test_file_names_of_another_operating_system_are_found(tmp_path):
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
    for name in ("images/d.png", "nowhere/b.JPG", "a\0/b.png", "\ud800.png"):  # reading them raises the error
        assert picture(name) == Path(name)
    if not (tmp_path / "IMAGES").exists():  # a case-sensitive disk
        assert "images/c.PNG is not there, and may be any of C.png, c.png" in picture("images/c.PNG")
        assert picture("images/new.png") == Path("images/new.png")
        (tmp_path / "images/NEW.png").touch()
        assert picture("images/new.png") == Path("images/NEW.png")  # the cached listing is not stale


def test_a_missing_or_empty_source_is_an_error(tmp_path):
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
    samples = list(islice(Samples([source], 0).from_position(0), 8))
    assert sorted(sample.text for sample in samples[:4]) == ["00", "01", "10", "11"]
    assert all(sample.picture == png("red") and sample.reference == png("blue") for sample in samples)
    later = list(islice(Samples([source], 0).from_position(3), 5))
    assert later[0].text == samples[3].text


def test_a_parquet_dataset_is_read(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = {"image": [{"bytes": png("red"), "path": None}] * 2, "text": ["a", "b"]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "hub/train.parquet")
    samples = list(islice(Samples([Source(str(tmp_path / "hub"))], 0).from_position(0), 2))
    assert sorted(sample.text for sample in samples) == ["a", "b"]
    assert samples[0].picture == png("red")
