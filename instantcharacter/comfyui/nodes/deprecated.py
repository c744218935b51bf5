"""The nodes of the earlier pack, by their names and with their inputs in order, so that shared files keep working.

They are deprecated: the nodes in ``nodes.py`` do more, and need nothing typed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io, ui

from ..folders import DOWNLOAD, choices, inside_models, locate, locate_flux
from ..loading import encode, load_adapter, load_encoder, load_flux_pipeline
from .types import CATEGORY

if TYPE_CHECKING:
    from ..hosting import HostedAdapter, HostedCharacter
    from ..sampler import HostedPipeline

logger = logging.getLogger(__name__)

Pipe = io.Custom("INSTANTCHAR_PIPE")
TOKEN_WARNING = (
    "InstantCharacter: a Hugging Face token is typed into a node. Workflow files and pictures keep what is typed into "
    "nodes: delete it there, and make a new one if you shared such a file. Run `hf auth login` or set HF_TOKEN instead."
)
CPU_OFFLOAD = "Kept for shared workflows. On or off, as much stays on the GPU as fits, and the rest streams."


@dataclass
class InstantCharPipe:
    """An INSTANTCHAR_PIPE: all that Generate needs, and the character that it drew last."""

    flux: HostedPipeline
    encoder: Any
    adapter: HostedAdapter
    last: tuple[torch.Tensor, HostedCharacter] | None = None

    def character(self, picture: torch.Tensor) -> HostedCharacter:
        """The character of an IMAGE's first picture, stretched to a square; the last picture's is remembered."""
        picture = picture[:1]
        if self.last is None or not torch.equal(self.last[0], picture):
            self.last = picture, encode(picture, self.encoder, self.adapter, fit="stretch")
        return self.last[1]


def flux_pipe(paths: Mapping[str, Any]) -> HostedPipeline:
    """FLUX of these files, as a FLUX_PIPE."""
    from ..sampler import HostedPipeline

    return HostedPipeline(load_flux_pipeline(paths), "auto")


class LoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InstantCharacterLoadModel",
            display_name="InstantCharacter Load Model (earlier pack)",
            category=f"{CATEGORY}/earlier pack",
            description="Kept for shared workflows. What is in ComfyUI's folders is used, the rest is fetched.",
            is_deprecated=True,
            inputs=[
                io.String.Input(
                    "hf_token",
                    multiline=True,
                    default="",
                    tooltip="Leave it empty: workflow files keep what is typed here. Run `hf auth login` instead.",
                ),
                io.Combo.Input(
                    "ip_adapter_name",
                    options=choices("adapter"),
                    tooltip="The adapter, from models/ipadapter; “download” fetches it if it is not there.",
                ),
                io.Boolean.Input("cpu_offload", default=False, tooltip=CPU_OFFLOAD),
            ],
            outputs=[Pipe.Output(display_name="pipe", tooltip="To InstantCharacter Generate.")],
        )

    @classmethod
    def execute(cls, hf_token: str, ip_adapter_name: str, cpu_offload: bool) -> io.NodeOutput:
        from ..hosting import progress

        token = hf_token.strip()
        if token:
            logger.warning(TOKEN_WARNING)
        flux = locate_flux(dict.fromkeys(("flux", "clip_l", "t5", "vae"), DOWNLOAD), progress(), token)
        encoders = [locate(name, DOWNLOAD, progress(), token) for name in ("siglip", "dinov2")]
        pipe = InstantCharPipe(
            flux_pipe(flux),
            load_encoder(*encoders),
            load_adapter(locate("adapter", ip_adapter_name, progress(), token)),
        )
        return io.NodeOutput(pipe, ui=ui.PreviewText(TOKEN_WARNING) if token else None)


class LoadModelFromLocal(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        where = "in ComfyUI's model folders"
        return io.Schema(
            node_id="InstantCharacterLoadModelFromLocal",
            display_name="InstantCharacter Load Model From Local (earlier pack)",
            category=f"{CATEGORY}/earlier pack",
            description="Kept for shared workflows. Paths are looked up inside ComfyUI's model folders.",
            is_deprecated=True,
            inputs=[
                io.String.Input("base_model_path", default="", tooltip=f"FLUX.1 as a diffusers folder, {where}."),
                io.String.Input("image_encoder_path", default="", tooltip=f"SigLIP, a file or folder, {where}."),
                io.String.Input(
                    "image_encoder_2_path", default="", tooltip=f"DINOv2 giant, a file or folder, {where}."
                ),
                io.String.Input("ip_adapter_path", default="", tooltip=f"The adapter's file, {where}."),
                io.Boolean.Input("cpu_offload", default=False, tooltip=CPU_OFFLOAD),
            ],
            outputs=[Pipe.Output(display_name="pipe", tooltip="To InstantCharacter Generate.")],
        )

    @classmethod
    def execute(
        cls,
        base_model_path: str,
        image_encoder_path: str,
        image_encoder_2_path: str,
        ip_adapter_path: str,
        cpu_offload: bool,
    ) -> io.NodeOutput:
        given = (base_model_path, image_encoder_path, image_encoder_2_path, ip_adapter_path)
        flux, siglip, dinov2, adapter = map(inside_models, given)
        return io.NodeOutput(
            InstantCharPipe(
                flux_pipe({"flux": flux}),
                load_encoder(siglip, dinov2),
                load_adapter(adapter),
            )
        )


class Generate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        side: dict[str, Any] = {"min": 256, "max": 2048, "step": 64}
        return io.Schema(
            node_id="InstantCharacterGenerate",
            display_name="InstantCharacter Generate (earlier pack)",
            category=f"{CATEGORY}/earlier pack",
            description="Kept for shared workflows. InstantCharacter Sampler does the same and more.",
            is_deprecated=True,
            inputs=[
                Pipe.Input("pipe", tooltip="From one of the earlier pack's loaders."),
                io.String.Input("prompt", multiline=True, default="", tooltip="What the character does, and where."),
                io.Int.Input("height", default=768, tooltip="In pixels.", **side),
                io.Int.Input("width", default=1024, tooltip="In pixels.", **side),
                io.Float.Input(
                    "guidance_scale", default=3.5, min=0.0, max=10.0, step=0.1, tooltip="FLUX's own guidance: 2 to 4."
                ),
                io.Int.Input("num_inference_steps", default=28, min=1, max=100, tooltip="28 for FLUX.1-dev."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="The same seed draws the same picture.",
                ),
                io.Float.Input(
                    "subject_scale",
                    default=0.9,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How strongly the character is drawn: 0.6 to 1.",
                ),
                io.Image.Input(
                    "subject_image",
                    optional=True,
                    tooltip="The character; stretched to a square, as the earlier pack did. Without it, plain FLUX.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The picture.")],
        )

    @classmethod
    def execute(
        cls,
        pipe: InstantCharPipe,
        prompt: str,
        height: int,
        width: int,
        guidance_scale: float,
        num_inference_steps: int,
        seed: int,
        subject_scale: float,
        subject_image: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        from ..images import images
        from ..sampler import Prompt

        drawing = pipe.flux.draw(
            None if subject_image is None else pipe.character(images(subject_image, "subject_image")),
            Prompt(prompt),
            (width, height),
            num_inference_steps,
            seed,
            guidance_scale=guidance_scale,
            subject_scale=subject_scale,
        )
        return io.NodeOutput(drawing.image)
