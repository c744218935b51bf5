"""The parser of the command line: its commands, their flags, and the help that ``--help`` prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from ..batch.values import SEED
from ..files import catalog
from .argument_types import axis, file_name, lora, number, prompt, scale, size, whole_number
from .options import (
    CACHE_THRESHOLD,
    SIZE,
    TOY_SIZE,
    BatchOptions,
    ConvertOptions,
    DemoOptions,
    DownloadOptions,
    EncodeOptions,
    GenerateOptions,
    Options,
    PictureOptions,
    Strategy,
    TrainOptions,
)

DTYPES = ("bfloat16", "float16", "float32")


def parse(arguments: Sequence[str]) -> Options:
    """The options of the command that the arguments name.

    Raises:
        SystemExit: after ``--help``, and with status 2 for arguments that no command takes.
    """
    values = vars(build_parser().parse_args(arguments))
    command = values.pop("options")
    if issubclass(command, PictureOptions) and values["size"] is None:
        values["size"] = TOY_SIZE if values["model"] == catalog.TOY else SIZE
    return command(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    installed = Path(sys.argv[0]).stem == "instantcharacter"
    parser = argparse.ArgumentParser(
        "instantcharacter" if installed else "python -m instantcharacter",
        description="Generate pictures of a character from one reference picture.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_batch(commands)
    _add_encode(commands)
    _add_convert(commands)
    _add_download(commands)
    _add_train(commands)
    _add_demo(commands)
    return parser


def _add_generate(commands: Any) -> None:
    command = _add_command(commands, "generate", GenerateOptions, "generate a picture; the PNG carries its settings")
    _add_reference_options(command, required=False)
    add = command.add_argument
    add("--save-character", type=Path, metavar="FILE", help="save the reference's character")
    add("--prompt", type=prompt, required=True, help="text that describes the picture")
    add("--output", type=Path, required=True, metavar="OUT.png")
    _add_picture_options(command)
    add("--seed", type=whole_number(*SEED), help="the same seed generates the same picture")
    add("--grid", type=axis, nargs="+", default=[], metavar="NAME=VALUES",
        help="a labelled sheet of every combination in place of one picture, such as scale=0.6,0.9 guidance=2.5,3.5 "
        "seed=1,2,3; the last has the columns")  # fmt: skip
    _add_flux_options(command)
    _add_model_options(command)


def _add_batch(commands: Any) -> None:
    command = _add_command(
        commands, "batch", BatchOptions, "generate many pictures, and those that are missing after an interruption"
    )
    add = command.add_argument
    add("jobs", type=Path, metavar="JOBS", help="a .jsonl or .csv file with a line for each picture: prompt, and any "
        "of reference, character, mask, region (where in the picture), scale, seed, size, steps, guidance, "
        "negative_prompt, true_cfg, lora, output; in CSV with | between values. The options are for lines "
        "without a value")  # fmt: skip
    add("--output", type=Path, required=True, metavar="FOLDER", help="where the pictures and index.html go")
    add("--batch-size", type=whole_number(1, 1000), metavar="N", help="the most pictures at once (what fits, up to 4)")
    add("--skip-bad", action="store_true", help="generate the good lines if there are bad ones; the status is 1")
    _add_reference_options(command, required=False)
    _add_picture_options(command)
    add("--seed", type=whole_number(*SEED), help="of the first line (0); each line has one more")
    add("--negative-prompt", type=prompt, metavar="TEXT", help="what pictures are not to show, with --true-cfg")
    add("--true-cfg", type=number(1, 100), default=1.0, metavar="SCALE",
        help="classifier-free guidance by the negative prompt, above 1; twice the time")  # fmt: skip
    _add_flux_options(command)
    _add_model_options(command)


def _add_picture_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--character", type=Path, action="append", default=[], metavar="FILE",
        help="a saved character, in place of a reference; repeat for several")  # fmt: skip
    add("--scale", type=scale, nargs="+", default=[0.9],
        help="strength, 0.6 to 1 (0.9), or START:MIDDLE:END of one that changes over the steps; one for all, or one "
        "each, references first")  # fmt: skip
    for kind in ("double", "single"):
        add(f"--scale-{kind}", type=number(0, 10), nargs="+", default=[1.0], metavar="FACTOR",
            help=f"factor on the scale in FLUX's {kind} blocks (1); one for all, or one each")  # fmt: skip
    add("--steps", type=whole_number(1, 1000), default=28, help="denoising steps (28)")
    add("--guidance", type=number(0, 100), default=3.5, help="FLUX's guidance (3.5)")
    add("--size", type=size, metavar="WxH", help="pixels (1024x1024; with the toy model 256x256)")
    add("--lora", type=lora, action="append", default=[], metavar="FILE:WEIGHT",
        help="a style LoRA; repeat for several")  # fmt: skip


def _add_flux_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--model", default=catalog.FLUX, help="FLUX.1: one file (with --clip-l, --t5 and --vae), a diffusers folder, "
        f"a hub id ({catalog.FLUX}), or toy: small models that come with the pack")  # fmt: skip
    for name, title in (("clip-l", "CLIP-L"), ("t5", "T5-XXL"), ("vae", "FLUX's VAE")):
        add(f"--{name}", type=Path, metavar="FILE", help=f"{title}, where --model is one file")
    add("--offload", choices=get_args(Strategy), default="auto", help="what stays on the GPU: as much as fits (auto), "
        "everything, one model at a time, as little as streaming allows, or one layer at a time")  # fmt: skip
    add("--vram", type=number(0.1, 1000), metavar="GIB", help="GPU memory to use at most (what is free)")
    fp8 = command.add_mutually_exclusive_group()
    choice: dict[str, Any] = {"dest": "weight_dtype", "action": "store_const", "default": "default"}
    fp8.add_argument("--fp8", **choice, const="fp8_e4m3fn",
        help="store FLUX's large weights in 8 bits: 0.63 x its memory, and a slightly different picture")  # fmt: skip
    fp8.add_argument("--fp8-fast", **choice, const="fp8_e4m3fn_fast",
        help="compute in 8 bits, too: faster with --compile; for GeForce RTX 40 and 50, L40, H100 and up")  # fmt: skip
    add("--compile", action="store_true", help="compile FLUX with torch: half a minute once, then steps take 3/4")
    add("--cache", type=number(0, 10), nargs="?", const=CACHE_THRESHOLD, default=0.0, metavar="THRESHOLD",
        help="leave out steps whose effect can be predicted within this fraction "
        f"({CACHE_THRESHOLD}): less time, and a slightly different picture")  # fmt: skip
    add("--parallel", choices=("context",), help="under torchrun: all processes, each with a GPU, compute each picture "
        "together")  # fmt: skip


def _add_encode(commands: Any) -> None:
    command = _add_command(
        commands,
        "encode",
        EncodeOptions,
        "make a character file from a picture; needs no FLUX",
    )
    _add_reference_options(command, required=True)
    command.add_argument("--output", type=Path, required=True, metavar="CHARACTER.safetensors")
    _add_model_options(command)


def _add_convert(commands: Any) -> None:
    command = _add_command(commands, "convert", ConvertOptions, "write an adapter file as .safetensors or .bin")
    command.add_argument("adapter", help="the released .bin, or another adapter file")
    command.add_argument("--output", type=Path, help="beside the original, as .safetensors, if not given")
    command.add_argument("--dtype", choices=DTYPES, help="the file's own if not given; folded, bfloat16")
    command.add_argument("--folded", action="store_true",
                         help="write only what generates pictures of saved characters, a fifth of it all")  # fmt: skip


def _add_download(commands: Any) -> None:
    command = _add_command(
        commands,
        "download",
        DownloadOptions,
        "download missing model files into ComfyUI's folders",
    )
    names = ", ".join(catalog.FILES)
    command.add_argument("file", nargs="*", metavar="FILE", type=file_name, help=f"names: {names} (all: 45 GB)")
    command.add_argument("--models", type=Path, metavar="FOLDER",
                         help="ComfyUI's models folder, if this pack is not installed in it")  # fmt: skip


def _add_train(commands: Any) -> None:
    command = _add_command(
        commands,
        "train",
        TrainOptions,
        "train an adapter in stages, or continue an interrupted training",
    )
    command.add_argument("config", type=Path, nargs="+", metavar="CONFIG.yaml",
                         help="a file for each stage, such as those in instantcharacter/training/stages")  # fmt: skip
    command.add_argument("--prepare", type=whole_number(1, 10**9), metavar="SAMPLES",
                         help="fill the cache for this number of samples, and do not train")  # fmt: skip


def _add_demo(commands: Any) -> None:
    command = _add_command(
        commands,
        "demo",
        DemoOptions,
        "four prompts, three strengths and a style LoRA with the toy models",
    )
    command.add_argument("--reference", type=Path, default=catalog.TOY_FOLDER.parent / "monster.png")
    command.add_argument("--output", type=Path, default=Path("output/demo.png"))


def _add_command(commands: Any, name: str, options: type[Options], help_line: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help_line, description=f"{help_line[0].upper()}{help_line[1:]}.")
    command.add_argument("--verbose", action="store_true", help="show the libraries' messages and tracebacks")
    command.set_defaults(options=options)
    return command


def _add_reference_options(command: argparse.ArgumentParser, required: bool) -> None:
    add = command.add_argument
    add("--reference", action="append", default=[], required=required, metavar="PICTURE",
        help="a picture of the character; repeat for several characters")  # fmt: skip
    add("--mask", action="append", default=[], metavar="PICTURE",
        help="cuts the character out of its reference; white is the character")  # fmt: skip
    add("--fit", choices=("pad", "stretch"), default="pad",
        help="how the reference becomes a square: padded with white, or stretched (pad)")  # fmt: skip


def _add_model_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--siglip", default=catalog.SIGLIP, help="a folder, hub id or .safetensors, or toy")
    add("--dinov2", default=catalog.DINOV2, help="a folder, hub id or .safetensors, or toy")
    add("--adapter", default=catalog.ADAPTER, help="a .bin, .safetensors, folder or hub id, or toy")
    add("--device", help="cuda:1 for the second GPU; mps on a Mac, cuda if there is one, else cpu")
    add("--dtype", choices=DTYPES, help="bfloat16 on a GPU, else float32")
