"""The command line: ``python -m instantcharacter {generate,encode,convert,download,train,demo}``."""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

from ..files import catalog as models
from ..files import folders as model_folders
from ..files.download import adapter_file, fetch

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..flux.pipeline import InstantCharacterPipeline
    from ..model.adapter import CharacterAdapter
    from ..model.character import Character

DTYPES = ("bfloat16", "float16", "float32")
SIZE, TOY_SIZE = (1024, 1024), (256, 256)
MODEL_FILES = (".safetensors", ".sft", ".gguf", ".bin")
FLUX_PARTS = ("clip_l", "t5", "vae")
"""What FLUX in one file comes without."""
REAL_COMMAND = (
    "python -m instantcharacter generate --reference assets/character.png "
    '--prompt "the fox flies a paper plane over the sea" --output output/fox.png'
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for an error, 130 when cancelled."""
    options = _parser().parse_args(arguments)
    _quieten(options.verbose)
    try:
        options.command(options)
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr)
        return 130
    except Exception as error:  # one line for people; the whole story with --verbose
        if options.verbose:
            traceback.print_exc()
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def generate(options: argparse.Namespace) -> None:
    """Draw a picture and write it as PNG, its settings in its text."""
    _choose_models(options)
    pictures, characters = _references(options), _load_characters(options.character)
    _check_generate(options, len(pictures), len(characters))
    adapter = _load_adapter(options)
    for character in characters:
        character.check_made_by(adapter.fingerprint())
    if pictures:
        made = _make_characters(adapter, pictures, options)
        if options.save_character:
            made[0].save(options.save_character)
            print(f"wrote {options.save_character}")
        characters = made + characters
    seed = random.getrandbits(32) if options.seed is None else options.seed
    image = _draw(_load_pipeline(adapter, options), options, characters, seed)
    _write_picture(image, options, seed)
    print(f"wrote {options.output} (seed {seed})")


def encode(options: argparse.Namespace) -> None:
    """Make a character file of a picture: needs the encoders and the adapter, not FLUX."""
    if len(options.reference) != 1:
        raise ValueError(f"a character is made of one picture; there are {len(options.reference)} --reference")
    _choose_models(options)
    pictures = _references(options)
    _check_output(options.output, ".safetensors")
    (character,) = _make_characters(_load_adapter(options), pictures, options)
    character.save(options.output)
    print(f"wrote {options.output}")


def convert(options: argparse.Namespace) -> None:
    """Write an adapter as ``.safetensors``, beside the original unless told otherwise."""
    from ..model.adapter import CharacterAdapter

    _check_source("adapter", options.adapter)
    source = adapter_file(options.adapter)
    output = options.output or source.with_suffix(".safetensors")
    if output.suffix not in (".safetensors", ".bin"):
        raise ValueError(f"--output {output}: expected a name that ends in .safetensors or .bin")
    if output.exists():
        raise FileExistsError(f"{output} is there already: delete it, or name another with --output")
    _check_writable(output)
    with _stages("convert", 2) as begin:
        begin("reading")
        adapter = CharacterAdapter.from_file(source, dtype=_dtype(options) if options.dtype else None)
        begin("writing")
        adapter.save(output)
    print(f"wrote {output}")


def download(options: argparse.Namespace) -> None:
    """Fetch model files into ComfyUI's folders; what is there is not fetched again."""
    comfyui = model_folders.comfyui_folder()
    folder = options.models or (comfyui and comfyui / "models")
    if folder is None or not folder.is_dir():
        found = f"there is no folder {folder}" if folder else "this pack is in no ComfyUI"
        raise FileNotFoundError(f"{found}: give ComfyUI's models folder with --models")
    folders = model_folders.model_folders(folder)
    for name in options.file or models.FILES:
        file = models.FILES[name]
        path = model_folders.find(file, folders)
        if path is None:
            with _bytes(file.title) as told:
                path = fetch(file, model_folders.save_folder(file, folders, folder), told)
        print(f"{name}: {path}")


def train(options: argparse.Namespace) -> None:
    """Train an adapter as YAML files say, one stage after the other, or go on where that training was left."""
    from .. import training

    stages = [training.read_config(path) for path in options.config]
    if options.prepare:
        for config in stages:
            training.prepare(config, options.prepare)
            print(f"wrote {config.cache}")
    else:
        print(f"wrote {training.train(*stages)}")


def demo(options: argparse.Namespace) -> None:
    """Draw a character with the toy models that come with the pack: four prompts, three strengths, a style LoRA."""
    from ..files.atomic import atomic_write
    from .demo import draw_demo

    _check_output(options.output, ".png", options.reference)
    page = draw_demo(options.reference)
    with atomic_write(options.output) as partial:
        page.save(partial, format="PNG")
    print(f"wrote {options.output}")
    print(f"With the real weights (FLUX.1-dev, about 47 GB to fetch, a GPU):\n  {REAL_COMMAND}")


def _choose_models(options: argparse.Namespace) -> None:
    """Have the toy models' paths where the toy is chosen, with its FLUX all of them; refuse what cannot be a model."""
    usual = {"siglip": models.SIGLIP, "dinov2": models.DINOV2, "adapter": models.ADAPTER}
    whole = getattr(options, "model", None) == models.TOY
    for name in usual:
        if getattr(options, name) == models.TOY or (whole and getattr(options, name) == usual[name]):
            setattr(options, name, str(models.toy(name)))
    if whole:
        options.model = str(models.toy("flux"))
    if "size" in options:
        options.size = options.size or (TOY_SIZE if whole else SIZE)
    for name in ("model", *usual):
        if name in options:
            _check_source(f"--{name}", getattr(options, name))


def _check_source(flag: str, source: str) -> None:
    """Raise ``FileNotFoundError`` for what is neither there nor the name of a repository on the hub."""
    if Path(source).suffix in MODEL_FILES and not Path(source).is_file():
        raise FileNotFoundError(f"there is no file {source} ({flag})")
    if not source or not (Path(source).exists() or re.fullmatch(r"[\w.-]*\w/[\w.-]+", source)):
        raise FileNotFoundError(f"there is no file or folder {source!r}, nor can it be on the hub ({flag})")


def _check_generate(options: argparse.Namespace, pictures: int, characters: int) -> None:
    """Refuse, before anything long, what could not end well."""
    count = pictures + characters
    if not count:
        raise ValueError("nobody to draw: give --reference PICTURE or --character FILE")
    if len(options.scale) not in (1, count):
        raise ValueError(f"{len(options.scale)} --scale for {count} characters: give one for all, or one each")
    for path, _ in options.lora:
        if not path.is_file():
            raise FileNotFoundError(f"there is no LoRA file {path}")
    _check_model(options)
    _check_output(options.output, ".png", *options.reference, *(options.mask or ()))
    if options.save_character:
        _check_output(options.save_character, ".safetensors", *options.character)
        if pictures != 1:
            raise ValueError(f"--save-character keeps one character; there are {pictures} --reference")


def _check_model(options: argparse.Namespace) -> None:
    """Refuse FLUX in files of its own of which some are missing."""
    parts = {f"--{name.replace('_', '-')}": getattr(options, name) for name in FLUX_PARTS}
    for flag, path in parts.items():
        if path and not path.is_file():
            raise FileNotFoundError(f"there is no file {path} ({flag})")
    model = Path(options.model)
    if model.is_file():
        if missing := [flag for flag, path in parts.items() if not path]:
            raise ValueError(f"{model} is FLUX alone: give {', '.join(f'{flag} FILE' for flag in missing)} too")
    elif any(parts.values()) and not model.is_dir():
        raise ValueError(f"{', '.join(flag for flag, path in parts.items() if path)}: only with --model FILE or FOLDER")


def _draw(
    pipeline: InstantCharacterPipeline, options: argparse.Namespace, characters: list[Character], seed: int
) -> Image.Image:
    import torch

    width, height = options.size
    result = pipeline(
        options.prompt,
        subject_image=characters,
        subject_scale=options.scale[0] if len(options.scale) == 1 else options.scale,
        width=width,
        height=height,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        generator=torch.Generator().manual_seed(seed),
    )
    return result.images[0]


def _write_picture(image: Image.Image, options: argparse.Namespace, seed: int) -> None:
    """A PNG that says how it was made, without the paths of whoever made it."""
    from PIL.PngImagePlugin import PngInfo

    from ..files.atomic import atomic_write

    width, height = options.size
    settings = {
        "prompt": options.prompt,
        "scale": options.scale,
        "steps": options.steps,
        "guidance": options.guidance,
        "size": f"{width}x{height}",
        "seed": seed,
        "lora": [f"{path.name}:{weight}" for path, weight in options.lora],
        "model": Path(options.model).name,
    }
    text = PngInfo()
    text.add_itxt("Description", options.prompt)
    text.add_itxt("instantcharacter", json.dumps(settings, ensure_ascii=False))
    with atomic_write(options.output) as partial:
        image.save(partial, format="PNG", pnginfo=text)


def _load_adapter(options: argparse.Namespace) -> CharacterAdapter:
    from ..model.adapter import CharacterAdapter

    with _stages("adapter", 1) as begin:
        begin("loading")
        return CharacterAdapter.from_file(adapter_file(options.adapter), dtype=_dtype(options))


def _make_characters(
    adapter: CharacterAdapter, pictures: list[Image.Image], options: argparse.Namespace
) -> list[Character]:
    """Characters of the pictures; the encoders are let go of afterwards."""
    from ..character.encoders import CharacterEncoder
    from ..offload.streaming import on_device

    device, dtype = _device(options), _dtype(options)
    with _stages("reference", 1 + len(pictures)) as begin:
        begin("loading the encoders")
        with _named(options.siglip, options.dinov2):
            encoder = CharacterEncoder.from_pretrained(options.siglip, options.dinov2, dtype=dtype)
        characters = []
        with on_device(encoder, device), on_device(adapter.projector, device):
            for picture in pictures:
                begin("looking at the picture")
                characters.append(adapter.create_character(encoder(picture, options.fit)))
    return characters


def _load_pipeline(adapter: CharacterAdapter, options: argparse.Namespace) -> InstantCharacterPipeline:
    """FLUX with its LoRAs and the adapter, placed as ``--offload`` says."""
    from ..flux.lora import load_lora

    with _stages("FLUX", 3) as begin:
        begin("loading")
        pipeline = _load_flux(options)
        begin("adding LoRAs")
        names = [f"style{i}" for i in range(len(options.lora))]
        for name, (path, _) in zip(names, options.lora):
            load_lora(pipeline, path, name)
        if names:
            pipeline.set_adapters(names, [weight for _, weight in options.lora])
        begin("folding the adapter in")
        pipeline.set_character_adapter(adapter)
    plan = pipeline.enable_character_offload(options.offload, options.vram, _device(options))
    if options.verbose:
        print(plan, file=sys.stderr)
    if options.compile:
        pipeline.enable_character_compile()
    return pipeline


def _load_flux(options: argparse.Namespace) -> InstantCharacterPipeline:
    """FLUX from the files or the folder that are given, or from the hub."""
    from ..flux.load import FluxFiles, load_flux, store_in_fp8
    from ..flux.pipeline import InstantCharacterPipeline

    model, parts = Path(options.model), {name: getattr(options, name) for name in FLUX_PARTS}
    if model.is_file():
        parts["clip_tokenizer"], parts["t5_tokenizer"] = model_folders.tokenizers(model, options.clip_l, options.t5)
    if model.exists():
        return load_flux(FluxFiles(model, **parts), _dtype(options), options.fp8)
    with _named(options.model):
        pipeline = InstantCharacterPipeline.from_pretrained(options.model, torch_dtype=_dtype(options))
    if options.fp8:
        store_in_fp8(pipeline.transformer, _dtype(options))
    return pipeline


@contextmanager
def _named(*sources: str) -> Iterator[None]:
    """The hub's errors in the block, with the names of what was asked of it."""
    remote = [source for source in sources if not Path(source).exists()]
    try:
        yield
    except OSError as error:
        if not remote:
            raise
        raise OSError(f"{' or '.join(remote)} could not be had: {_one_line(error)}") from error


def _references(options: argparse.Namespace) -> list[Image.Image]:
    """The reference pictures, cut out where there are masks."""
    from ..character.image import cut_out, open_picture

    masks = options.mask or [None] * len(options.reference)
    if len(masks) != len(options.reference):
        raise ValueError(f"{len(masks)} --mask for {len(options.reference)} --reference: give one each, or none")
    return [
        open_picture(picture) if mask is None else cut_out(picture, mask)
        for picture, mask in zip(options.reference, masks)
    ]


def _load_characters(paths: list[Path]) -> list[Character]:
    from ..model.character import Character

    return [Character.load(path) for path in paths]


def _check_output(path: Path, suffix: str, *inputs: str | Path) -> None:
    """Before the long work: refuse an output that cannot be written, or replaces an input or another kind of file."""
    from ..files.atomic import check_replaceable
    from ..model.character import is_character

    if path.suffix != suffix:
        raise ValueError(f"{path}: expected a name that ends in {suffix}")
    _check_writable(path)
    if path.exists() and any(path.samefile(given) for given in inputs):
        raise FileExistsError(f"{path} is what the picture is made of: choose another name")
    check_replaceable(path, *{".png": ("a PNG", _is_png), ".safetensors": ("a character", is_character)}[suffix])


def _check_writable(path: Path) -> None:
    """Raise ``OSError`` unless the folder takes a new file whose name is as long as that of one half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(prefix=f".{path.name}.", suffix=".part", dir=path.parent):
        pass


def _is_png(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8) == b"\x89PNG\r\n\x1a\n"


@contextmanager
def _bytes(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar in bytes: call what it gives with how many are here, and how many there are."""
    from huggingface_hub.utils import tqdm

    with tqdm(desc=title, unit="B", unit_scale=True) as bar:

        def tell(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield tell


def _device(options: argparse.Namespace) -> torch.device:
    """The device that was named, or else the one there is."""
    import torch

    from ..offload.offloader import default_device

    return torch.device(options.device or default_device())


def _dtype(options: argparse.Namespace) -> torch.dtype:
    import torch

    return getattr(torch, options.dtype or ("float32" if _device(options).type == "cpu" else "bfloat16"))


@contextmanager
def _stages(name: str, count: int) -> Iterator[Callable[[str], None]]:
    """A progress bar over long stages: call what it gives with each stage's name as the stage begins."""
    from huggingface_hub.utils import tqdm

    with tqdm(total=count, desc=name) as bar:
        begun: list[str] = []

        def begin(stage: str) -> None:
            if begun:
                bar.update()
            begun.append(stage)
            bar.set_postfix_str(stage)

        yield begin
        bar.update()


def _quieten(verbose: bool) -> None:
    """Keep libraries' remarks, which are for developers, from people who did not ask for them."""
    if not verbose:
        warnings.filterwarnings("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[0] if lines else type(error).__name__
    if "out of memory" in message:
        return f"{message} Try --vram with less, --offload sequential, or a smaller --size."
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.strerror}: {error.filename}"
    return message


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m instantcharacter", description="Draw a character from one picture.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = _command(commands, "generate", generate)
    _reference_options(command, required=False)
    command.add_argument("--character", type=Path, action="append", default=[], metavar="FILE",
                         help="a character made before, in place of a reference; repeat for several")  # fmt: skip
    command.add_argument("--save-character", type=Path, metavar="FILE", help="keep the reference's character")
    command.add_argument("--prompt", required=True, help="what to draw")
    command.add_argument("--output", type=Path, required=True, metavar="OUT.png")
    command.add_argument("--scale", type=_number(-10, 10), nargs="+", default=[0.9],
                         help="strength, 0.6 to 1 (0.9); one for all, or one each, references first")  # fmt: skip
    command.add_argument("--steps", type=_whole(1, 1000), default=28, help="denoising steps (28)")
    command.add_argument("--guidance", type=_number(0, 100), default=3.5, help="FLUX's guidance (3.5)")
    command.add_argument("--size", type=_size, metavar="WxH", help="pixels (1024x1024; 256x256 of the toy model)")
    command.add_argument("--seed", type=_whole(0, 2**64 - 1), help="the same seed draws the same picture")
    command.add_argument("--lora", type=_lora, action="append", default=[], metavar="FILE:WEIGHT",
                         help="a style LoRA; repeat for several")  # fmt: skip
    command.add_argument("--model", default=models.FLUX, help="FLUX.1: one file (with --clip-l, --t5 and --vae), a "
                         f"diffusers folder, a hub id ({models.FLUX}), or toy: small models that come with the pack"
                         )  # fmt: skip
    for name, what in (("clip-l", "CLIP-L"), ("t5", "T5-XXL"), ("vae", "FLUX's VAE")):
        command.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"{what}, where --model is one file")
    command.add_argument("--offload", choices=("auto", "none", "model", "stream", "sequential"), default="auto",
                         help="what stays on the GPU: as much as fits (auto), everything, one model at a time, as "
                         "little as streaming can, or one layer at a time")  # fmt: skip
    command.add_argument("--vram", type=_number(0.1, 1000), metavar="GIB",
                         help="GPU memory to use at the most (what is free)")  # fmt: skip
    command.add_argument("--fp8", action="store_true", help="keep FLUX's large weights in 8 bits: 0.63 x its memory, "
                         "and not the same picture")  # fmt: skip
    command.add_argument("--compile", action="store_true",
                         help="have torch compile FLUX: half a minute once, then steps take 3/4")  # fmt: skip
    _model_options(command)

    command = _command(commands, "encode", encode)
    _reference_options(command, required=True)
    command.add_argument("--output", type=Path, required=True, metavar="CHARACTER.safetensors")
    _model_options(command)

    command = _command(commands, "convert", convert)
    command.add_argument("adapter", help="the released .bin, or another adapter file")
    command.add_argument("--output", type=Path, help="beside the original, as .safetensors, if not given")
    command.add_argument("--dtype", choices=DTYPES, help="the file's own if not given")
    command.set_defaults(device=None)

    command = _command(commands, "download", download)
    command.add_argument("file", nargs="*", metavar="FILE", type=_file_name,
                         help=f"which: {', '.join(models.FILES)} (all: 45 GB)")  # fmt: skip
    command.add_argument("--models", type=Path, metavar="FOLDER",
                         help="ComfyUI's models folder, if this pack is not installed in it")  # fmt: skip

    command = _command(commands, "train", train)
    command.add_argument(
        "config", type=Path, nargs="+", metavar="CONFIG.yaml", help="such as those in instantcharacter/training/stages"
    )
    command.add_argument("--prepare", type=_whole(1, 10**9), metavar="SAMPLES",
                         help="fill the cache with what so many samples need, and do not train")  # fmt: skip

    command = _command(commands, "demo", demo)
    command.add_argument("--reference", type=Path, default=models.TOY_FOLDER.parent / "monster.png")
    command.add_argument("--output", type=Path, default=Path("output/demo.png"))
    return parser


def _command(commands: Any, name: str, function: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
    help_line = (function.__doc__ or "").splitlines()[0]
    command = commands.add_parser(name, help=help_line, description=help_line)
    command.add_argument("--verbose", action="store_true", help="the libraries' remarks, and the traceback of an error")
    command.set_defaults(command=function)
    return command


def _reference_options(command: argparse.ArgumentParser, required: bool) -> None:
    command.add_argument("--reference", action="append", default=[], required=required, metavar="PICTURE",
                         help="a picture of the character; repeat for several characters")  # fmt: skip
    command.add_argument("--mask", action="append", metavar="PICTURE", help="what to cut out of it: white keeps")
    command.add_argument("--fit", choices=("pad", "stretch"), default="pad",
                         help="how the reference becomes a square: on white, or distorted (pad)")  # fmt: skip


def _model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--siglip", default=models.SIGLIP, help="a folder, hub id or .safetensors, or toy")
    command.add_argument("--dinov2", default=models.DINOV2, help="a folder, hub id or .safetensors, or toy")
    command.add_argument("--adapter", default=models.ADAPTER, help="a .bin, .safetensors, folder or hub id, or toy")
    command.add_argument("--device", help="mps on a Mac, cuda if there is one, else cpu")
    command.add_argument("--dtype", choices=DTYPES, help="bfloat16 on a GPU, else float32")


def _file_name(text: str) -> str:
    if text not in models.FILES:
        raise argparse.ArgumentTypeError(f"{text}: expected one of {', '.join(models.FILES)}")
    return text


def _number(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = float(text)
        if not low <= value <= high:  # NaN is not either
            raise argparse.ArgumentTypeError(f"{text}: expected {low} to {high}")
        return value

    return parse


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: expected {low} to {high}")
        return value

    return parse


def _size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT, or one number for a square."""
    sides = text.lower().split("x") if "x" in text.lower() else [text, text]
    if len(sides) != 2 or not all(side.isdecimal() and int(side) and int(side) % 16 == 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text}: expected WIDTHxHEIGHT in multiples of 16, such as 1024x768")
    return int(sides[0]), int(sides[1])


def _lora(text: str) -> tuple[Path, float]:
    """FILE or FILE:WEIGHT; a colon elsewhere belongs to the file's name."""
    path, colon, weight = text.rpartition(":")
    try:
        return (Path(path), _number(-10, 10)(weight)) if colon else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0
