"""The nodes that make a character from a reference picture, save it and load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..folders import character_file, listed
from ..images import to_image
from ..loading import encode
from .types import CATEGORY, Adapter, CharacterType, Encoder

if TYPE_CHECKING:
    from ...model.character import Character
    from ..hosting import HostedAdapter, HostedCharacter


class Encode(io.ComfyNode):
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
    def execute(cls, image: torch.Tensor, encoder: Any, adapter: HostedAdapter) -> io.NodeOutput:
        return io.NodeOutput(encode(image, encoder, adapter))


class SaveCharacter(io.ComfyNode):
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
    def execute(cls, character: HostedCharacter, name: str, overwrite: bool) -> io.NodeOutput:
        from ...model.character import Character

        path = character_file(name)
        if path.is_file() and not overwrite and not Character.load(path).is_same(character.character):
            raise FileExistsError(f"there is another character in {path}: choose another name, or switch overwrite on")
        character.character.save(path)
        return io.NodeOutput(ui=thumbnail_preview(character.character, cls))


class LoadCharacter(io.ComfyNode):
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
    def execute(cls, name: str, adapter: HostedAdapter) -> io.NodeOutput:
        from ...model.character import Character
        from ..hosting import HostedCharacter

        character = Character.load(folder_paths.get_full_path_or_raise("characters", name))
        character.check_made_by(adapter.fingerprint)
        return io.NodeOutput(HostedCharacter(character, adapter), ui=thumbnail_preview(character, cls))


def thumbnail_preview(character: Character, node: type) -> Any:
    """The character's thumbnail as a preview on a node; None if it has no thumbnail."""
    return character.thumbnail and ui.PreviewImage(to_image(character.thumbnail)[None], cls=node)
