"""Parts of a rehearsal: which prompts run on which card."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from .prompts import CHANGES, COMPILED, FAST, FOLDERS, GGUF, LORA, SWITCHES, WORKFLOWS, Prompt


@dataclass(frozen=True)
class RehearsalPart:
    """The prompts of one server.

    Attributes:
        name: as the command line has it.
        prompts: in this order; no server starts without any.
        files: kinds of files that it needs beside the released models, see ``benchmarks.rehearsal.files``.
        gib: the card's memory; None is the whole card.
        static: without dynamic VRAM.
    """

    name: str
    prompts: tuple[Prompt, ...] = ()
    files: tuple[str, ...] = ()
    gib: int | None = None
    static: bool = False


PARTS = (
    RehearsalPart("files"),
    RehearsalPart("all", WORKFLOWS),
    RehearsalPart("changes", CHANGES),
    RehearsalPart("switches", SWITCHES),
    RehearsalPart("lora", LORA),
    RehearsalPart("compile", COMPILED),
    RehearsalPart("fast", FAST),
    RehearsalPart("folders", FOLDERS, ("diffusers",)),
    RehearsalPart("gguf", GGUF, ("gguf",)),
)
USUAL = ("all", "changes", "lora", "folders")


def part_named(name: str) -> RehearsalPart:
    """A part by its name, such as ``24``, ``24-static`` or ``switches-24``."""
    stem, known = name.removesuffix("-static"), {part.name: part for part in PARTS}
    prompts, _, gib = (f"all-{stem}" if stem.isdecimal() else stem).partition("-")
    if prompts not in known or not (gib.isdecimal() or not gib):
        raise argparse.ArgumentTypeError(f"{name} is no part; expected {', '.join(known)}, or GiB such as 24")
    return replace(known[prompts], name=name, gib=int(gib) if gib else None, static=stem != name)


def tiny(parts: list[RehearsalPart]) -> RehearsalPart:
    """All of them as one. BiRefNet has one size, which takes minutes on a CPU, so that it is left out."""
    prompts = {prompt.name: prompt for part in parts for prompt in part.prompts}
    small = tuple(prompt for prompt in prompts.values() if prompt.workflow != "background_removal")
    return RehearsalPart("tiny", small, tuple(file for part in parts for file in part.files))


def only(part: RehearsalPart, words: str) -> RehearsalPart:
    return replace(part, prompts=tuple(prompt for prompt in part.prompts if words in prompt.name))
