"""Command lines: words of any kind for every flag of every command.

Models are not loaded: what they would make is stood in for, so that thousands of command lines run. What is read,
checked and written around them is real.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support import recorded
from support.fuzzing import Outcomes, run_command

from instantcharacter import Character, CharacterAdapter, Strength
from instantcharacter.cli.loading import choose_device
from instantcharacter.files.catalog import FILES
from instantcharacter.model.character import is_character

GOOD_FILES = [
    *(
        "picture.png",
        "grey.png",
        "link.png",
        "fox.safetensors",
        "adapter.safetensors",
        "adapter.bin",
        "lora.safetensors",
    ),
    *("new.png", "made.safetensors"),
]
BAD_FILES = [
    *(
        "notes.txt",
        "broken.png",
        "empty",
        "folder",
        "made.bin",
        "folder/new.png",
        "far/away/new.png",
        "notes.txt/new.png",
    ),
    *("loop.png", "folder/../new.png", "new.PNG", "new.jpg", "new", ".png", ".", "..", "~", "-", "", " ", "new.png "),
    *(
        "CON",
        "a:b.png",
        "fox.",
        "\x1b[31m.png",
        "a\nb.png",
        "\udcff.png",
        "ä.png",
        "\N{FOX FACE}.png",
        "x" * 250 + ".png",
    ),
    *("x" * 300, "/dev/null", "/dev/full", "/proc/self/mem", "tencent/InstantCharacter"),
]
NUMBERS = [
    *("0", "1", "2", "0.9", "-0", "-1", "-0.5", "1e-9", "5e-324", "10", "100", "1000", "1e30", "1e999", "nan", "-nan"),
    *(
        "inf",
        "-inf",
        "Infinity",
        "0x10",
        "1_000",
        "\u0663",
        "\uff15",
        "\u00bd",
        "9" * 40,
        "9" * 5000,
        "1.5",
        "1,5",
        ".",
    ),
    *("1:2", "1:2:3", "1:nan:1", "::", "1:1:1:1", "True", "None", "\udc80", "1e", "+1", "", " ", "a", " 1 ", "1\n"),
]
SIZES = [
    *(
        "48x32",
        "16",
        "16x16",
        "64X32",
        "0x0",
        "0",
        "16x",
        "x16",
        "16x16x16",
        "-16x16",
        "1e3x16",
        "17x16",
        "99999999x16",
    ),
    *("160000000", "16.0x16", "nan", "\u0661\u0666x16", "\u00b2x16", "16384x16400", "9" * 5000, "16x" + "9" * 5000),
]
AXES = [
    *("scale=0.6,0.9", "guidance=2.5", "seed=1,2,3", "seed=1e30", "scale=nan", "guidance=inf", "steps=1", "scale", "="),
    *(
        "scale=",
        "scale=,",
        "seed=0.5",
        "seed=-1",
        "scale=1,1",
        "SCALE=1",
        "scale=1=2",
        "\udc80=1",
        "scale=\udc80",
        "a\nb",
    ),
    *("seed=" + "9" * 5000, "seed=" + ",".join(map(str, range(300)))),
]
TEXTS = ["a fox", "", " ", "x" * 3000, "\udcff", "a\nb", "\x1b[31m", "\N{FOX FACE}", "\u202e", "{}", "%s", "\ufeff"]
NAMES = [
    "toy",
    "cpu",
    "cuda",
    "cuda:9",
    "mps",
    "meta",
    "xpu",
    "float32",
    "int8",
    "pad",
    "stretch",
    "auto",
    "none",
    "model",
]
HUBS = [
    "a/b",
    "a/b/c",
    "../b",
    "a//b",
    "a--b/c",
    "https://huggingface.co/a/b",
    "hf://a/b",
    "C:\\a\\b",
    "a b/c",
    "\udcff/b",
]

characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")  # no system passes these on
numbers = st.sampled_from(NUMBERS) | st.floats(0, 2).map(str) | st.floats().map(str) | st.integers().map(str)
paths = st.sampled_from(GOOD_FILES) | st.sampled_from([*GOOD_FILES, *BAD_FILES])
texts = st.sampled_from(TEXTS) | st.text(characters, max_size=8)
names = st.sampled_from(NAMES)
words = numbers | paths | texts | names | st.sampled_from([*SIZES, *AXES, *HUBS])
models = paths | st.sampled_from(["toy", *HUBS])
loras = paths | st.tuples(st.just("lora.safetensors"), numbers).map(":".join)

ENCODE = {
    **dict.fromkeys(("--siglip", "--dinov2", "--adapter"), models),
    "--mask": paths, "--fit": names, "--device": names, "--dtype": names,
}  # fmt: skip
GENERATE = {
    **ENCODE,
    **dict.fromkeys(("--character", "--reference", "--save-character", "--clip-l", "--t5", "--vae"), paths),
    **dict.fromkeys(("--scale", "--scale-double", "--scale-single", "--steps", "--guidance", "--seed"), numbers),
    "--cache": numbers, "--vram": numbers, "--size": st.sampled_from(SIZES), "--grid": st.sampled_from(AXES),
    "--lora": loras, "--model": models, "--offload": names, "--prompt": texts,
}  # fmt: skip
SWITCHES = st.sampled_from(("--fp8", "--fp8-fast", "--compile", "--folded", "--gone", "--prom", "--s"))


def lines(*first: str, flags: dict[str, st.SearchStrategy[str]], most: int = 3) -> st.SearchStrategy[list[str]]:
    """Command lines that begin as a good one; flags and words follow, which may replace its own."""
    flag = st.sampled_from(sorted(flags)).flatmap(lambda flag: flags[flag].map(lambda word: (flag, word)))
    joined = flag.map(lambda flag: ["=".join(flag)])
    rare = flag.map(list) | SWITCHES.map(lambda switch: [switch]) | words.map(lambda word: [word])
    groups = st.integers(0, 9).flatmap(lambda number: joined if number else rare)
    return st.lists(groups, max_size=most).map(lambda more: [*first, *(word for group in more for word in group)])


class Pipeline:
    """Generates black pictures; it takes what the real one takes from the command line."""

    def __call__(self, prompt: str, *, width: int, height: int, **settings: Any) -> Any:
        prompt.encode()
        values = (
            vars(scale).values() if isinstance(scale, Strength) else [scale] for scale in settings["subject_scale"]
        )
        strengths = [value for each in values for value in each]
        assert all(abs(value) <= 100 for value in strengths), strengths
        assert 0 <= settings["guidance_scale"] <= 100
        assert 0 <= settings["cache_threshold"] <= 10
        assert 1 <= settings["num_inference_steps"] <= 1000
        assert 0 < width * height <= 2**28
        return SimpleNamespace(images=[Image.new("RGB", (width, height))])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that :data:`GOOD_FILES` and :data:`BAD_FILES` name."""
    folder = tmp_path_factory.mktemp("files")
    Image.new("RGB", (20, 20), "red").save(folder / "picture.png")
    Image.new("L", (20, 20), 255).save(folder / "grey.png")
    (folder / "notes.txt").write_text("my notes")
    (folder / "broken.png").write_bytes((folder / "picture.png").read_bytes()[:60])
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    adapter = recorded.adapter()
    Character(torch.zeros(1, 4, recorded.adapter().config.feature_dim), adapter.fingerprint()).save(
        folder / "fox.safetensors"
    )
    adapter.save(folder / "adapter.safetensors")
    adapter.save(folder / "adapter.bin")
    shutil.copy(recorded.FOLDER / "style_lora.safetensors", folder / "lora.safetensors")
    (folder / "link.png").symlink_to("picture.png")
    (folder / "loop.png").symlink_to("loop.png")
    return folder


@pytest.fixture
def fresh(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Makes the working directory a copy of the files, as each command line finds them."""
    monkeypatch.setattr("instantcharacter.cli.loading.load_pipeline", lambda *_: Pipeline())
    monkeypatch.setattr("instantcharacter.cli.loading.load_adapter", lambda *_: recorded.adapter())
    monkeypatch.setattr("instantcharacter.cli.demo.generate_demo", lambda *_: Image.new("RGB", (16, 16)))
    monkeypatch.setattr("instantcharacter.cli.loading.create_characters", create_characters)
    monkeypatch.setattr("instantcharacter.cli.files.fetch", lambda file, folder, _: write(folder / file.saved_as))
    folder = tmp_path / "here"

    def copied() -> Path:
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(files, folder, symlinks=True)
        monkeypatch.chdir(folder)
        return folder

    return copied


def create_characters(adapter: CharacterAdapter, pictures: list[Image.Image], options: Any) -> list[Character]:
    choose_device(options.device)
    return [Character(torch.ones(1, 4, adapter.config.feature_dim), adapter.fingerprint()) for _ in pictures]


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"model")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    own = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(folder)): path.read_bytes() for path in own}


def is_picture(data: bytes) -> bool:
    return data.startswith(b"\x89PNG")


def changes_are_right(folder: Path, before: dict[str, bytes], printed: str, announced: str) -> bool:
    """Whether each file that is new or changed was announced, is whole, and replaced its kind or an empty one."""
    after = contents(folder)
    assert before.keys() <= after.keys()
    changed = [name for name in after if after[name] != before.get(name)]
    for name in changed:
        path, old = folder / name, before.get(name)
        if path.suffix == ".png":
            assert is_picture(after[name])
            assert not old or is_picture(old)
            Image.open(path).load()
        elif is_character(path):
            assert Character.load(path).fused.isfinite().all()
            assert not old or b"instantcharacter.character" in old[:2000]
        else:
            assert not old
            assert path.suffix in (".safetensors", ".bin")
    assert not [name for name in after if ".part" in name]
    return len([line for line in printed.splitlines() if announced in line]) >= len(changed)


def judge(outcomes: Outcomes, folder: Path, arguments: list[str], announced: str = "wrote ") -> None:
    """A command line does what it says, or is refused and changes no file that was there."""
    before = contents(folder)

    def is_right(printed: str) -> bool:
        helps = printed.startswith("usage: ")
        return helps or (changes_are_right(folder, before, printed, announced) and announced in printed)

    if outcomes.judge(lambda: run_command(arguments), is_right) == "clear":
        after = contents(folder)
        assert all(after.get(name) == data for name, data in before.items()), arguments


@given(
    arguments=lines(
        "generate",
        "--prompt=a fox",
        "--reference=picture.png",
        "--output=new.png",
        "--size=48x32",
        flags={**GENERATE, "--output": paths},
    )
)
def test_generate(outcomes, fresh, arguments):
    judge(outcomes, fresh(), arguments)


@given(
    arguments=lines(
        "encode", "--reference=picture.png", "--output=new.safetensors", flags={**ENCODE, "--output": paths}
    )
)
def test_encode(outcomes, fresh, arguments):
    judge(outcomes, fresh(), arguments)


@given(
    source=st.sampled_from(["adapter.safetensors", "adapter.bin"]) | models,
    arguments=lines(
        "--output=made.safetensors",
        flags={"--output": paths, "--dtype": st.sampled_from(["float32", "float16"]) | names},
        most=2,
    ),
)
def test_convert(outcomes, fresh, source, arguments):
    judge(outcomes, fresh(), ["convert", source, *arguments])


@given(arguments=lines("demo", flags={"--reference": paths, "--output": paths}, most=3))
def test_demo(outcomes, fresh, arguments):
    judge(outcomes, fresh(), arguments)


@given(
    names=st.lists(st.sampled_from((*FILES, "everything", "", "\udcff", "FLUX")), max_size=3),
    folder=st.sampled_from(["folder", ".", "far"]) | paths,
)
def test_download(outcomes, fresh, names, folder):
    judge(outcomes, fresh(), ["download", *names, f"--models={folder}"], announced=": ")


@given(
    arguments=st.lists(words | st.sampled_from(("generate", "encode", "train", "--help", "-h")), min_size=1, max_size=4)
)
def test_any_words(outcomes, fresh, arguments):
    judge(outcomes, fresh(), arguments)
