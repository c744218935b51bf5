"""InstantCharacter Sweep: a labelled sheet of pictures for choosing settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from comfy_api.latest import io, ui

from .types import CATEGORY, CharacterType, FluxPipe, Node, prompt_input

if TYPE_CHECKING:
    from ..hosting import HostedCharacter
    from ..sampler import StyledPipeline


class Sweep(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InstantCharacterSweep",
            display_name="InstantCharacter Sweep",
            category=CATEGORY,
            description="Generates a picture for every combination of scale, guidance and seed, and shows them on a "
            "labelled sheet, for choosing settings. Each picture is the Sampler's with the same settings.",
            is_output_node=True,
            inputs=[
                FluxPipe.Input("flux_pipe", tooltip="From Load FLUX (InstantCharacter)."),
                CharacterType.Input("character", optional=True, tooltip="The character. Without one: plain FLUX."),
                prompt_input("As for InstantCharacter Sampler."),
                io.String.Input(
                    "scale",
                    default="0.6, 0.8, 1.0",
                    tooltip="Strengths of the character, separated by commas. Of scale, guidance and seed, the last "
                    "with several values has the columns.",
                ),
                io.String.Input(
                    "guidance", default="3.5", tooltip="Values of FLUX's own guidance, separated by commas: 2 to 4."
                ),
                io.String.Input("seed", default="1, 2, 3", tooltip="Seeds, separated by commas."),
                io.Int.Input("width", default=1024, min=256, max=4096, step=16, tooltip="Of a picture, in pixels."),
                io.Int.Input("height", default=1024, min=256, max=4096, step=16, tooltip="Of a picture, in pixels."),
                io.Int.Input("steps", default=28, min=1, max=200, tooltip="Denoising steps of each picture."),
                io.Conditioning.Input(
                    "positive", optional=True, tooltip="Replaces the prompt: a CONDITIONING of one prompt for FLUX."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Image.Output(display_name="sheet", tooltip="All pictures on one page with their settings."),
                io.Image.Output(display_name="images", tooltip="The pictures as a batch, row by row."),
            ],
        )

    @classmethod
    def run(
        cls,
        flux_pipe: StyledPipeline,
        prompt: str,
        scale: str,
        guidance: str,
        seed: str,
        width: int,
        height: int,
        steps: int,
        character: HostedCharacter | None = None,
        positive: list | None = None,
    ) -> io.NodeOutput:
        from ...flux.sweep import cross, describe, labelled_page, parse_values
        from ..images import to_image
        from ..init_image import Prompt
        from ..progress import show_text

        texts = {"scale": scale, "guidance": guidance, "seed": seed}
        axes = {name: parse_values(name, text) for name, text in texts.items()}
        page, corners = labelled_page(axes, (width, height))
        sheet, images = to_image(page), []
        for i, ((x, y), settings) in enumerate(zip(corners, cross(axes)), 1):
            show_text(cls, f"{i} of {len(corners)}: {describe(settings)}")
            image = flux_pipe.generate(
                character,
                Prompt(prompt if positive is None else positive),
                (width, height),
                steps,
                int(settings["seed"]),
                guidance_scale=settings["guidance"],
                subject_scale=settings["scale"],
            ).image
            sheet[y : y + height, x : x + width] = image[0]
            images.append(image)
        return io.NodeOutput(sheet[None], torch.cat(images), ui=ui.PreviewImage(sheet[None], cls=cls))
