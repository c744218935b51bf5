"""The nodes that load FLUX, the encoders and the adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import comfy.model_management as management
from comfy_api.latest import io

from ...files.catalog import TOY
from ..folders import choices, listed, locate, locate_flux
from ..loading import check_arithmetic, load_adapter, load_encoder, load_flux_pipeline, lora_file
from .types import CATEGORY, NONE, Adapter, Encoder, FluxPipe, Node

if TYPE_CHECKING:
    from ...flux.fp8 import WeightDtype
    from ...offload import Strategy

IN_FOLDER = "from the FLUX folder"
"""The choice that takes a text encoder or the VAE from FLUX's diffusers folder."""
OFFLOAD = ["auto", "none", "model", "stream", "sequential"]


class FluxLoader(Node):
    def __init__(self) -> None:
        from ..model_cache import shared_cache

        super().__init__()
        self.cache = shared_cache("pipeline")  # ComfyUI keeps the node, and the node keeps the cache

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InstantCharacterFluxLoader",
            display_name="Load FLUX (InstantCharacter)",
            category=CATEGORY,
            description="Loads FLUX.1 with its text encoders and VAE, for InstantCharacter Sampler. With ComfyUI's own "
            "loaders and KSampler, use InstantCharacter Apply instead.",
            inputs=[
                io.Combo.Input(
                    "flux",
                    options=[*choices("flux"), TOY],
                    tooltip="FLUX.1 from models/unet or models/diffusion_models: one file (bf16, fp16, plain fp8, "
                    "GGUF) or a diffusers folder. “download” uses flux1-dev.safetensors, and downloads it (23.8 GB) "
                    "only if it is missing. “toy” is a small model inside the pack, with text encoders and VAE, for "
                    "256×256 pictures of cartoon characters: for a first try of the nodes.",
                ),
                io.Combo.Input(
                    "clip_l",
                    options=[*choices("clip_l"), IN_FOLDER, NONE],
                    tooltip="CLIP-L from models/text_encoders. “from the FLUX folder” for a diffusers folder; “none” "
                    "if the Sampler gets its prompts as CONDITIONING.",
                ),
                io.Combo.Input(
                    "t5",
                    options=[*choices("t5"), IN_FOLDER, NONE],
                    tooltip="T5-XXL from models/text_encoders: fp16, fp8 or scaled fp8. The other choices are those "
                    "of clip_l.",
                ),
                io.Combo.Input(
                    "vae",
                    options=[*choices("vae"), IN_FOLDER],
                    tooltip="FLUX's VAE from models/vae: ae.safetensors.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=["default", "fp8_e4m3fn", "fp8_e4m3fn_fast"],
                    tooltip="default: 16 bits (22 GB). fp8_e4m3fn: 8 bits where possible (14 GB in all), a little "
                    "slower and less exact. fp8_e4m3fn_fast: computes in 8 bits, too, which is faster with compile; "
                    "on GeForce RTX 40 and 50, L40, H100 and later. For GGUF files: default.",
                ),
                io.Combo.Input(
                    "offload",
                    options=OFFLOAD,
                    tooltip="Which weights stay on the GPU. auto: as many as fit; the others stream in while FLUX "
                    "computes. none: all of them. model: one model at a time. stream: as few as streaming allows, "
                    "about 3 GiB. sequential: one layer at a time, very slow.",
                ),
                io.Combo.Input(
                    "lora",
                    options=[NONE, *listed("loras"), TOY],
                    optional=True,
                    tooltip="A style LoRA for FLUX.1; put its trigger words into the prompt. “toy” is a pixel art "
                    "style for the toy FLUX.",
                ),
                io.Float.Input(
                    "lora_strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    round=0.001,
                    optional=True,
                    tooltip="Strength of the LoRA.",
                ),
                io.Float.Input(
                    "vram_gb",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.5,
                    optional=True,
                    tooltip="Limit of GPU memory in GiB; 0 for all that ComfyUI has.",
                ),
                io.Boolean.Input(
                    "compile",
                    default=False,
                    optional=True,
                    tooltip="Compiles FLUX with torch.compile. The first picture takes half a minute longer; then a "
                    "step takes three quarters of the time. Not for GGUF.",
                ),
            ],
            outputs=[FluxPipe.Output(display_name="flux_pipe", tooltip="For InstantCharacter Sampler.")],
        )

    @classmethod
    def run(
        cls,
        flux: str,
        clip_l: str,
        t5: str,
        vae: str,
        weight_dtype: WeightDtype,
        offload: Strategy,
        lora: str = NONE,
        lora_strength: float = 1.0,
        vram_gb: float = 0.0,
        compile: bool = False,
    ) -> io.NodeOutput:
        from ...files.reading import file_states
        from ..model_cache import shared_cache
        from ..progress import progress
        from ..sampler import HostedPipeline, StyledPipeline

        check_arithmetic(weight_dtype)
        if flux == TOY:
            clip_l = t5 = vae = IN_FOLDER
        chosen = {"flux": flux, "clip_l": clip_l, "t5": t5, "vae": vae}
        chosen = {name: choice for name, choice in chosen.items() if choice not in (NONE, IN_FOLDER)}
        paths = locate_flux(chosen, progress())
        style = None if lora == NONE else lora_file(lora)
        files = [path and file_states(path) for path in (*paths.values(), style)]
        hosted = shared_cache("pipeline").get(
            (*files, weight_dtype, offload, vram_gb, compile, management.get_torch_device()),
            lambda: HostedPipeline(load_flux_pipeline(paths, weight_dtype, style), offload, vram_gb, compile),
        )
        return io.NodeOutput(StyledPipeline(hosted, lora_strength))


class EncoderLoader(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        folders = "from models/clipvision or models/clip_vision. “download” downloads it"
        return io.Schema(
            node_id="InstantCharacterEncoderLoader",
            display_name="Load Character Encoder",
            category=CATEGORY,
            description="Loads the two vision models that encode the reference picture.",
            inputs=[
                io.Combo.Input(
                    "siglip",
                    options=[*choices("siglip"), TOY],
                    tooltip=f"SigLIP so400m at 384 px, {folders} (0.86 GB) only if it is missing. Flux Redux uses the "
                    "same file. “toy” is a small model inside the pack, for the toy adapter.",
                ),
                io.Combo.Input(
                    "dinov2",
                    options=[*choices("dinov2"), TOY],
                    tooltip=f"DINOv2 giant, {folders} (4.5 GB) only if it is missing. “toy” as for siglip.",
                ),
            ],
            outputs=[Encoder.Output(display_name="encoder", tooltip="For InstantCharacter Encode.")],
        )

    @classmethod
    def run(cls, siglip: str, dinov2: str) -> io.NodeOutput:
        from ..progress import progress

        return io.NodeOutput(load_encoder(locate("siglip", siglip, progress()), locate("dinov2", dinov2, progress())))


class AdapterLoader(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InstantCharacterAdapterLoader",
            display_name="Load Character Adapter",
            category=CATEGORY,
            description="Loads the weights of InstantCharacter.",
            inputs=[
                io.Combo.Input(
                    "adapter",
                    options=[*choices("adapter"), TOY],
                    tooltip="instantcharacter_ip-adapter.bin from models/ipadapter, or a .safetensors file that the "
                    "convert command made from it; one made with --folded (1.1 GB) generates saved characters only. "
                    "“download” downloads it (5.6 GB) only if it is missing. “toy” is a small adapter inside the pack, "
                    "for the toy FLUX and encoders.",
                )
            ],
            outputs=[Adapter.Output(display_name="adapter", tooltip="For InstantCharacter Encode or Load Character.")],
        )

    @classmethod
    def run(cls, adapter: str) -> io.NodeOutput:
        from ..progress import progress

        return io.NodeOutput(load_adapter(locate("adapter", adapter, progress())))


class ToyLoader(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InstantCharacterToy",
            display_name="Load Toy FLUX",
            category=CATEGORY,
            description="Loads the small FLUX inside the pack for ComfyUI's own nodes: to try InstantCharacter Apply, "
            "masks, samplers and LoRAs on any machine, with 256×256 pictures of cartoon characters.",
            inputs=[
                io.Float.Input(
                    "lora_strength",
                    default=0.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Strength of the pack's toy LoRA, a pixel art style; 0 for none. Begin the prompt with "
                    "“pixel art of”.",
                )
            ],
            outputs=[
                io.Model.Output(tooltip="For InstantCharacter Apply with the toy adapter, or KSampler."),
                io.Clip.Output(
                    tooltip="For CLIP Text Encode. The toy understands sentences such as “a picture of a "
                    "character waving on a beach”."
                ),
                io.Vae.Output(tooltip="For VAE Decode. It goes with the toy alone."),
            ],
        )

    @classmethod
    def run(cls, lora_strength: float) -> io.NodeOutput:
        from ..toy import load_toy

        return io.NodeOutput(*load_toy(lora_strength))
