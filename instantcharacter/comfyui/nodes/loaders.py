"""The nodes that load FLUX, the encoders and the adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ...files.catalog import TOY
from ..folders import choices, listed, locate, locate_flux
from ..loading import load_adapter, load_encoder, load_flux_pipeline, lora_file
from .types import CATEGORY, NONE, Adapter, Encoder, FluxPipe

if TYPE_CHECKING:
    from ...offload.planning import Strategy

IN_FOLDER = "from the FLUX folder"
OFFLOAD = ["auto", "none", "model", "stream", "sequential"]


class FluxLoader(io.ComfyNode):
    def __init__(self) -> None:
        from ..sampler import last_pipeline

        super().__init__()
        self.last = last_pipeline()

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InstantCharacterFluxLoader",
            display_name="Load FLUX (InstantCharacter)",
            category=CATEGORY,
            description="FLUX.1 with its text encoders and VAE, for InstantCharacter Sampler. If you use ComfyUI's own "
            "loaders and KSampler, you need InstantCharacter Apply instead of this.",
            inputs=[
                io.Combo.Input(
                    "flux",
                    options=[*choices("flux"), TOY],
                    tooltip="FLUX.1 from models/unet or models/diffusion_models: one file (bf16, fp16, plain fp8, "
                    "GGUF), or a diffusers folder. “download” takes flux1-dev.safetensors, and fetches its 23.8 GB "
                    "only if it is not there. “toy” is a small model that comes with the pack, with its own texts and "
                    "VAE, for 256×256 pictures of cartoon characters: to try the nodes with.",
                ),
                io.Combo.Input(
                    "clip_l",
                    options=[*choices("clip_l"), IN_FOLDER, NONE],
                    tooltip="CLIP-L from models/text_encoders. “from the FLUX folder” if FLUX is a diffusers folder; "
                    "“none” if prompts come as CONDITIONING.",
                ),
                io.Combo.Input(
                    "t5",
                    options=[*choices("t5"), IN_FOLDER, NONE],
                    tooltip="T5-XXL from models/text_encoders: fp16, fp8 or scaled fp8; otherwise as clip_l.",
                ),
                io.Combo.Input(
                    "vae",
                    options=[*choices("vae"), IN_FOLDER],
                    tooltip="FLUX's VAE from models/vae: ae.safetensors.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=["default", "fp8_e4m3fn"],
                    tooltip="default keeps FLUX in 16 bits (22 GB). fp8_e4m3fn keeps it in 8 bits (14 GB with what"
                    " must stay in 16), a little slower and less exact. GGUF files stay as they are.",
                ),
                io.Combo.Input(
                    "offload",
                    options=OFFLOAD,
                    tooltip="What stays on the GPU. auto: as much as fits, the rest streams while FLUX computes. "
                    "none: everything. model: one model at a time. stream: as little as streaming can, "
                    "about 3 GiB. sequential: one layer at a time, very slow.",
                ),
                io.Combo.Input(
                    "lora",
                    options=[NONE, *listed("loras"), TOY],
                    optional=True,
                    tooltip="A style LoRA for FLUX.1; put its trigger words into the prompt. “toy” is pixel art, for "
                    "the toy FLUX.",
                ),
                io.Float.Input(
                    "lora_strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    optional=True,
                    tooltip="How strongly the LoRA is applied.",
                ),
                io.Float.Input(
                    "vram_gb",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.5,
                    optional=True,
                    tooltip="GPU memory to use at the most, in GiB; 0 is all that ComfyUI has.",
                ),
                io.Boolean.Input(
                    "compile",
                    default=False,
                    optional=True,
                    tooltip="Has torch compile FLUX at the first picture, which takes half a minute; then a step "
                    "takes three quarters of the time. Not with fp8 or GGUF.",
                ),
            ],
            outputs=[FluxPipe.Output(display_name="flux_pipe", tooltip="To InstantCharacter Sampler.")],
        )

    @classmethod
    def execute(
        cls,
        flux: str,
        clip_l: str,
        t5: str,
        vae: str,
        weight_dtype: str,
        offload: Strategy,
        lora: str = NONE,
        lora_strength: float = 1.0,
        vram_gb: float = 0.0,
        compile: bool = False,
    ) -> io.NodeOutput:
        from ...files.reading import file_states
        from ..hosting import progress
        from ..sampler import HostedPipeline, StyledPipeline, last_pipeline

        if flux == TOY:
            clip_l = t5 = vae = IN_FOLDER
        chosen = {"flux": flux, "clip_l": clip_l, "t5": t5, "vae": vae}
        chosen = {name: choice for name, choice in chosen.items() if choice not in (NONE, IN_FOLDER)}
        paths = locate_flux(chosen, progress())
        style = None if lora == NONE else lora_file(lora)
        files = [path and file_states(path) for path in (*paths.values(), style)]
        hosted = last_pipeline().get(
            (*files, weight_dtype, offload, vram_gb, compile),
            lambda: HostedPipeline(
                load_flux_pipeline(paths, weight_dtype == "fp8_e4m3fn", style), offload, vram_gb, compile
            ),
        )
        return io.NodeOutput(StyledPipeline(hosted, lora_strength))


class EncoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        where = "from models/clipvision or models/clip_vision. “download” fetches it only if it is not there"
        return io.Schema(
            node_id="InstantCharacterEncoderLoader",
            display_name="Load Character Encoder",
            category=CATEGORY,
            description="The two vision models that look at the reference picture.",
            inputs=[
                io.Combo.Input(
                    "siglip",
                    options=[*choices("siglip"), TOY],
                    tooltip=f"SigLIP so400m at 384 px, {where} (0.86 GB). It is the file that Flux Redux uses. "
                    "“toy” is a small one that comes with the pack, for the toy adapter.",
                ),
                io.Combo.Input(
                    "dinov2",
                    options=[*choices("dinov2"), TOY],
                    tooltip=f"DINOv2 giant, {where} (4.5 GB). “toy” as above.",
                ),
            ],
            outputs=[Encoder.Output(display_name="encoder", tooltip="To InstantCharacter Encode.")],
        )

    @classmethod
    def execute(cls, siglip: str, dinov2: str) -> io.NodeOutput:
        from ..hosting import progress

        return io.NodeOutput(load_encoder(locate("siglip", siglip, progress()), locate("dinov2", dinov2, progress())))


class AdapterLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InstantCharacterAdapterLoader",
            display_name="Load Character Adapter",
            category=CATEGORY,
            description="InstantCharacter's own weights.",
            inputs=[
                io.Combo.Input(
                    "adapter",
                    options=[*choices("adapter"), TOY],
                    tooltip="instantcharacter_ip-adapter.bin, or what convert made of it, from models/ipadapter. "
                    "“download” fetches its 5.6 GB only if it is not there. “toy” comes with the pack, for the toy "
                    "FLUX and encoders.",
                )
            ],
            outputs=[Adapter.Output(display_name="adapter", tooltip="To InstantCharacter Encode or Load Character.")],
        )

    @classmethod
    def execute(cls, adapter: str) -> io.NodeOutput:
        from ..hosting import progress

        return io.NodeOutput(load_adapter(locate("adapter", adapter, progress())))
