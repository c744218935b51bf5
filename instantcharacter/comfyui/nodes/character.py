"""The nodes that make a character of a picture, save it and load it."""

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
    from ...character.image import Keep, ResizeMode
    from ..hosting import HostedAdapter, HostedCharacter


class PrepareReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InstantCharacterPrepareReference",
            display_name="Prepare Character Reference",
            category=CATEGORY,
            description="Cuts the character out, on white, in a square: what the encoders see best. The character "
            "alone, large and whole, makes for the best likeness.",
            inputs=[
                io.Image.Input("image", tooltip="The reference picture; of a batch, each."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the character is: from Load Image, painted over the character or of a transparent "
                    "picture, or from a background removal node. Any size; one that masks nothing is no mask.",
                ),
                io.Float.Input(
                    "margin",
                    default=0.05,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="With a mask: white around the character, as a part of its longer side.",
                ),
                io.Combo.Input(
                    "fit",
                    options=["pad", "stretch"],
                    tooltip="Without a mask: how the picture becomes a square. pad: on white. stretch: distorted, "
                    "as the reference implementation does it.",
                ),
                io.Combo.Input(
                    "keep",
                    options=["auto", "white", "black"],
                    optional=True,
                    tooltip="Which side of the mask is the character. auto: white, unless white is transparent or the "
                    "ground around it. The node says what it kept.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Image.Output(display_name="reference", tooltip="Square, on white.")],
        )

    @classmethod
    def execute(
        cls, image: torch.Tensor, margin: float, fit: ResizeMode, mask: torch.Tensor | None = None, keep: Keep = "auto"
    ) -> io.NodeOutput:
        from ...character.image import prepare_reference
        from ..hosting import say
        from ..images import images, masks

        pictures, found = images(image), None if mask is None else masks(mask)
        if found is not None and len(found) not in (1, len(pictures)):
            raise ValueError(f"{len(found)} masks for {len(pictures)} pictures; give one for all, or one each")
        alphas = [None] * len(pictures) if found is None else found.expand(len(pictures), -1, -1)
        prepared = [prepare_reference(*pair, margin, fit, keep) for pair in zip(pictures, alphas)]
        side = max(square.width for square, _ in prepared)
        reference = torch.stack([to_image(square.resize((side, side))) for square, _ in prepared])
        kept = "\n".join(dict.fromkeys(sentence for _, sentence in prepared))
        say(cls, kept)
        return io.NodeOutput(reference, ui={**ui.PreviewImage(reference, cls=cls).as_dict(), "text": (kept,)})


class Encode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InstantCharacterEncode",
            display_name="InstantCharacter Encode",
            category=CATEGORY,
            description="Makes a character of its picture: once, then it can be drawn any number of times.",
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="The reference, best from Prepare Character Reference. A batch is several views of one "
                    "character; the adapter was trained with one view.",
                ),
                Encoder.Input("encoder", tooltip="From Load Character Encoder."),
                Adapter.Input("adapter", tooltip="From Load Character Adapter."),
            ],
            outputs=[CharacterType.Output(display_name="character", tooltip="To Apply, Sampler or Save Character.")],
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
            description="Keeps a character in models/characters (8 MB): drawn again, it needs no encoders.",
            is_output_node=True,
            inputs=[
                CharacterType.Input("character", tooltip="From InstantCharacter Encode."),
                io.String.Input("name", default="character", tooltip="Its file's name; folders are made as needed."),
                io.Boolean.Input(
                    "overwrite", default=False, tooltip="Whether another character of that name may be replaced."
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, character: HostedCharacter, name: str, overwrite: bool) -> io.NodeOutput:
        from ... import Character

        path = character_file(name)
        if path.is_file() and not overwrite and not Character.load(path).is_same(character.character):
            raise FileExistsError(f"there is another character in {path}: choose another name, or switch overwrite on")
        character.character.save(path)
        return io.NodeOutput(ui=shown(character.character, cls))


class LoadCharacter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InstantCharacterLoadCharacter",
            display_name="Load Character",
            category=CATEGORY,
            description="A character that was saved, for the adapter that made it.",
            inputs=[
                io.Combo.Input(
                    "name",
                    options=listed("characters"),
                    tooltip="From models/characters; press R to see new ones.",
                ),
                Adapter.Input("adapter", tooltip="The adapter that made it: from Load Character Adapter."),
            ],
            outputs=[CharacterType.Output(display_name="character", tooltip="To Apply or Sampler.")],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str, **_: Any) -> float:
        return Path(folder_paths.get_full_path_or_raise("characters", name)).stat().st_mtime

    @classmethod
    def execute(cls, name: str, adapter: HostedAdapter) -> io.NodeOutput:
        from ... import Character
        from ..hosting import HostedCharacter

        character = Character.load(folder_paths.get_full_path_or_raise("characters", name))
        character.check_made_by(adapter.fingerprint)
        return io.NodeOutput(HostedCharacter(character, adapter), ui=shown(character, cls))


def shown(character: Any, node: type) -> Any:
    """The character's thumbnail, on its node."""
    return character.thumbnail and ui.PreviewImage(to_image(character.thumbnail)[None], cls=node)
