"""The nodes that make a character from a reference picture, save it and load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..folders import character_file, character_folders, characters_in, listed, listed_character
from ..images import to_image
from ..loading import encode
from .types import CATEGORY, Adapter, CharacterType, Encoder, Node, fraction_input

if TYPE_CHECKING:
    from ...model.character import Character
    from ..hosting import HostedAdapter, HostedCharacter


class Encode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InstantCharacterEncode",
            display_name="InstantCharacter Encode",
            category=CATEGORY,
            description="Makes a character from a reference picture. It runs once for each reference; the character "
            "can then be generated any number of times.",
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="The reference, best from Prepare Character Reference. A batch is several pictures of one "
                    "character; the adapter was trained with one.",
                ),
                Encoder.Input("encoder", tooltip="From Load Character Encoder."),
                Adapter.Input("adapter", tooltip="From Load Character Adapter."),
            ],
            outputs=[CharacterType.Output(display_name="character", tooltip="For Apply, Sampler or Save Character.")],
        )

    @classmethod
    def run(cls, image: torch.Tensor, encoder: Any, adapter: HostedAdapter) -> io.NodeOutput:
        return io.NodeOutput(encode(image, encoder, adapter))


class SaveCharacter(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InstantCharacterSaveCharacter",
            display_name="Save Character",
            category=CATEGORY,
            description="Saves a character to models/characters (8 MB). Load Character needs no encoders.",
            is_output_node=True,
            inputs=[
                CharacterType.Input("character", tooltip="From InstantCharacter Encode."),
                io.String.Input("name", default="character", tooltip="File name; missing folders are created."),
                io.Boolean.Input(
                    "overwrite", default=False, tooltip="Whether to replace another character with the same name."
                ),
            ],
            outputs=[],
        )

    @classmethod
    def run(cls, character: HostedCharacter, name: str, overwrite: bool) -> io.NodeOutput:
        from ...model.character import Character

        path = character_file(name)
        if path.is_file() and not overwrite and not Character.load(path).is_same(character.character):
            raise FileExistsError(f"there is another character in {path}: choose another name, or switch overwrite on")
        character.character.save(path)
        return io.NodeOutput(ui=thumbnail_preview(character.character, cls))


class LoadCharacter(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InstantCharacterLoadCharacter",
            display_name="Load Character",
            category=CATEGORY,
            description="Loads a saved character, for the adapter that made it.",
            inputs=[
                io.Combo.Input(
                    "name",
                    options=listed("characters"),
                    tooltip="A file in models/characters. Press R to update the list.",
                ),
                Adapter.Input(
                    "adapter", tooltip="From Load Character Adapter: the adapter that the character was made with."
                ),
            ],
            outputs=[CharacterType.Output(display_name="character", tooltip="For Apply or Sampler.")],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str, **_: Any) -> float:
        """ComfyUI runs the node again when the file changes."""
        return Path(folder_paths.get_full_path_or_raise("characters", name)).stat().st_mtime

    @classmethod
    def run(cls, name: str, adapter: HostedAdapter) -> io.NodeOutput:
        from ...model.character import Character
        from ..hosting import HostedCharacter

        character = Character.load(folder_paths.get_full_path_or_raise("characters", name))
        character.check_made_by(adapter.fingerprint)
        return io.NodeOutput(HostedCharacter(character, adapter), ui=thumbnail_preview(character, cls))


class LoadCharacters(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InstantCharacterLoadCharacters",
            display_name="Load Characters",
            category=CATEGORY,
            description="Loads all saved characters of a folder, as a list: what follows runs once for each.",
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=character_folders(),
                    tooltip="A folder in models/characters, with those in it; / is all. Press R to update the list.",
                ),
                Adapter.Input(
                    "adapter", tooltip="From Load Character Adapter. Characters of other adapters are left out."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                CharacterType.Output(
                    display_name="characters", is_output_list=True, tooltip="For Apply or Sampler, one after the other."
                ),
                io.String.Output(
                    display_name="names", is_output_list=True, tooltip="Their names, for labels and file names."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str, **_: Any) -> list[tuple[str, float]]:
        """ComfyUI runs the node again when a file comes, goes or changes."""
        return [(name, listed_character(name).stat().st_mtime) for name in characters_in(folder)]

    @classmethod
    def run(cls, folder: str, adapter: HostedAdapter) -> io.NodeOutput:
        from ...model.character import Character, summary
        from ..hosting import HostedCharacter
        from ..progress import show_text

        made_by = {name: summary(listed_character(name)) for name in characters_in(folder)}
        names = [name for name, found in made_by.items() if found and found.fingerprint == adapter.fingerprint]
        if not names:
            raise ValueError(
                f"of the {len(made_by)} files in models/characters, folder {folder}, none is a character of this "
                f"adapter, {adapter.fingerprint}: save one with Save Character, or choose another folder or adapter"
            )
        show_text(cls, f"{len(names)} of {len(made_by)} files are characters of this adapter")
        characters = [HostedCharacter(Character.load(listed_character(name)), adapter) for name in names]
        return io.NodeOutput(characters, [Path(name).with_suffix("").as_posix() for name in names])


class MixCharacters(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InstantCharacterMixCharacters",
            display_name="Mix Characters",
            category=CATEGORY,
            description="Makes a character between two, with traits and colours of both.",
            inputs=[
                CharacterType.Input("character", tooltip="From Encode or Load Character."),
                CharacterType.Input("other", tooltip="Another one, of the same adapter and as many pictures."),
                fraction_input(
                    "weight",
                    0.5,
                    0.01,
                    "Of the other one: 0 is the first, 1 the other. Most changes between 0.4 and 0.6.",
                ),
            ],
            outputs=[CharacterType.Output(display_name="character", tooltip="For Apply, Sampler or Save Character.")],
        )

    @classmethod
    def run(cls, character: HostedCharacter, other: HostedCharacter, weight: float) -> io.NodeOutput:
        mixed = character.character.mix(other.character, weight)
        return io.NodeOutput(character._replace(character=mixed), ui=thumbnail_preview(mixed, cls))


def thumbnail_preview(character: Character, node: type) -> Any:
    """The character's thumbnail as a preview on a node; None if it has no thumbnail."""
    return character.thumbnail and ui.PreviewImage(to_image(character.thumbnail)[None], cls=node)
