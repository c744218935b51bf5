"""The nodes of the earlier InstantCharacter pack, with its node ids and inputs, for workflows that use them.

They are deprecated: the other nodes do more, without typed paths and tokens.
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
from .types import CATEGORY, Node, prompt_input, scale_input, seed_input

if TYPE_CHECKING:
    from ..hosting import HostedAdapter, HostedCharacter
    from ..sampler import HostedPipeline

logger = logging.getLogger(__name__)

Pipe = io.Custom("INSTANTCHAR_PIPE")
TOKEN_WARNING = (
    "InstantCharacter: a Hugging Face token is typed into a node. Workflow files and pictures keep what is typed into "
    "nodes: delete it there, and make a new one if you shared such a file. Run `hf auth login` or set HF_TOKEN instead."
)
DEPRECATED_CATEGORY = f"{CATEGORY}/earlier pack"
CPU_OFFLOAD = "It has no effect: as many weights as fit stay on the GPU, and the others stream in."


@dataclass
class InstantCharPipe:
    """An INSTANTCHAR_PIPE: the models of Generate, and the character of its last picture."""

    flux: HostedPipeline
    encoder: Any
    adapter: HostedAdapter
    last: tuple[torch.Tensor, HostedCharacter] | None = None

    def character(self, picture: torch.Tensor) -> HostedCharacter:
        """The character of an IMAGE's first picture, stretched to a square; cached for the same picture."""
        picture = picture[:1]
        if self.last is None or not torch.equal(self.last[0], picture):
            self.last = picture, encode(picture, self.encoder, self.adapter, fit="stretch")
        return self.last[1]


def load_flux(paths: Mapping[str, Any]) -> HostedPipeline:
    """Load FLUX from these files."""
    from ..sampler import HostedPipeline

    return HostedPipeline(load_flux_pipeline(paths), "auto")


class LoadModel(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InstantCharacterLoadModel",
            display_name="InstantCharacter Load Model (earlier pack)",
            category=DEPRECATED_CATEGORY,
            description="For workflows of the earlier pack. It uses the files in ComfyUI's folders, and downloads "
            "those that are missing.",
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
                    tooltip="The adapter, from models/ipadapter. “download” downloads it if it is missing.",
                ),
                io.Boolean.Input("cpu_offload", default=False, tooltip=CPU_OFFLOAD),
            ],
            outputs=[Pipe.Output(display_name="pipe", tooltip="For InstantCharacter Generate.")],
        )

    @classmethod
    def run(cls, hf_token: str, ip_adapter_name: str, cpu_offload: bool) -> io.NodeOutput:
        from ..progress import progress

        token = hf_token.strip()
        if token:
            logger.warning(TOKEN_WARNING)
        flux = locate_flux(dict.fromkeys(("flux", "clip_l", "t5", "vae"), DOWNLOAD), progress(), token)
        encoders = [locate(name, DOWNLOAD, progress(), token) for name in ("siglip", "dinov2")]
        adapter = locate("adapter", ip_adapter_name, progress(), token)
        pipe = InstantCharPipe(load_flux(flux), load_encoder(*encoders), load_adapter(adapter))
        return io.NodeOutput(pipe, ui=ui.PreviewText(TOKEN_WARNING) if token else None)


class LoadModelFromLocal(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        folders = "in ComfyUI's model folders"
        return io.Schema(
            node_id="InstantCharacterLoadModelFromLocal",
            display_name="InstantCharacter Load Model From Local (earlier pack)",
            category=DEPRECATED_CATEGORY,
            description="For workflows of the earlier pack. Paths are relative to ComfyUI's model folders.",
            is_deprecated=True,
            inputs=[
                io.String.Input("base_model_path", default="", tooltip=f"FLUX.1 as a diffusers folder, {folders}."),
                io.String.Input("image_encoder_path", default="", tooltip=f"SigLIP, a file or folder, {folders}."),
                io.String.Input(
                    "image_encoder_2_path", default="", tooltip=f"DINOv2 giant, a file or folder, {folders}."
                ),
                io.String.Input("ip_adapter_path", default="", tooltip=f"The adapter's file, {folders}."),
                io.Boolean.Input("cpu_offload", default=False, tooltip=CPU_OFFLOAD),
            ],
            outputs=[Pipe.Output(display_name="pipe", tooltip="For InstantCharacter Generate.")],
        )

    @classmethod
    def run(
        cls,
        base_model_path: str,
        image_encoder_path: str,
        image_encoder_2_path: str,
        ip_adapter_path: str,
        cpu_offload: bool,
    ) -> io.NodeOutput:
        typed = (base_model_path, image_encoder_path, image_encoder_2_path, ip_adapter_path)
        flux, siglip, dinov2, adapter = map(inside_models, typed)
        return io.NodeOutput(
            InstantCharPipe(load_flux({"flux": flux}), load_encoder(siglip, dinov2), load_adapter(adapter))
        )


class Generate(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        side: dict[str, Any] = {"min": 256, "max": 2048, "step": 64, "tooltip": "In pixels."}
        return io.Schema(
            node_id="InstantCharacterGenerate",
            display_name="InstantCharacter Generate (earlier pack)",
            category=DEPRECATED_CATEGORY,
            description="For workflows of the earlier pack. InstantCharacter Sampler does the same and more.",
            is_deprecated=True,
            inputs=[
                Pipe.Input("pipe", tooltip="From a loader of the earlier pack."),
                prompt_input("What the character does, and where."),
                io.Int.Input("height", default=768, **side),
                io.Int.Input("width", default=1024, **side),
                io.Float.Input(
                    "guidance_scale", default=3.5, min=0.0, max=10.0, step=0.1, tooltip="FLUX's own guidance: 2 to 4."
                ),
                io.Int.Input(
                    "num_inference_steps",
                    default=28,
                    min=1,
                    max=100,
                    tooltip="Denoising steps: 28 for FLUX.1-dev.",
                ),
                seed_input(),
                scale_input("subject_scale", "Strength of the character: 0.6 to 1."),
                io.Image.Input(
                    "subject_image",
                    optional=True,
                    tooltip="The character's picture, stretched to a square as in the earlier pack. Without one: plain "
                    "FLUX.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The generated picture.")],
        )

    @classmethod
    def run(
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
        from ..init_image import Prompt

        generated = pipe.flux.generate(
            None if subject_image is None else pipe.character(subject_image),
            Prompt(prompt),
            (width, height),
            num_inference_steps,
            seed,
            guidance_scale=guidance_scale,
            subject_scale=subject_scale,
        )
        return io.NodeOutput(generated.image)
