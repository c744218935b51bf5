"""The nodes: for each its schema, and a few lines that hand over to the library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io, ui

from .instantcharacter.comfyui import folders as comfy_folders
from .instantcharacter.comfyui.folders import choices, locate, locate_flux
from .instantcharacter.files.catalog import TOY, toy

if TYPE_CHECKING:
    from .instantcharacter.character.image import Keep, ResizeMode
    from .instantcharacter.comfyui.hosting import HostedAdapter, HostedCharacter
    from .instantcharacter.comfyui.sampler import StyledPipeline
    from .instantcharacter.flux.pipeline import InstantCharacterPipeline
    from .instantcharacter.offload.planning import Strategy

CATEGORY = "InstantCharacter"
NONE = "none"
IN_FOLDER = "from the FLUX folder"
OFFLOAD = ["auto", "none", "model", "stream", "sequential"]

FluxPipe = io.Custom("FLUX_PIPE")
Encoder = io.Custom("CHARACTER_ENCODER")
Adapter = io.Custom("CHARACTER_ADAPTER")
CharacterType = io.Custom("CHARACTER")


class FluxLoader(io.ComfyNode):
    def __init__(self) -> None:
        from .instantcharacter.comfyui.sampler import last_pipeline

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
                    options=[NONE, *comfy_folders.listed("loras"), TOY],
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
        from .instantcharacter.comfyui.hosting import progress
        from .instantcharacter.comfyui.sampler import HostedPipeline, StyledPipeline, last_pipeline
        from .instantcharacter.files.reading import file_states

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


def lora_file(choice: str) -> Path:
    """The path of what was chosen in a list of LoRAs."""
    return toy("lora") if choice == TOY else Path(folder_paths.get_full_path_or_raise("loras", choice))


def load_flux_pipeline(
    paths: Mapping[str, Any], fp8: bool = False, lora: Path | None = None
) -> InstantCharacterPipeline:
    """FLUX of these files, with its LoRA, on the CPU."""
    from .instantcharacter.comfyui.hosting import weight_dtype
    from .instantcharacter.flux.load import FluxFiles, load_flux
    from .instantcharacter.flux.lora import load_lora

    clip_tokenizer, t5_tokenizer = comfy_folders.tokenizers()
    files = FluxFiles(**paths, clip_tokenizer=clip_tokenizer, t5_tokenizer=t5_tokenizer)
    pipeline = load_flux(files, weight_dtype(), fp8)
    if lora:
        load_lora(pipeline, lora, "style")
    return pipeline


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
        from .instantcharacter.comfyui.hosting import progress

        return io.NodeOutput(load_encoder(locate("siglip", siglip, progress()), locate("dinov2", dinov2, progress())))


def load_encoder(siglip: Path, dinov2: Path) -> Any:
    """The encoders of these files or folders, as a CHARACTER_ENCODER."""
    from .instantcharacter import CharacterEncoder
    from .instantcharacter.comfyui.hosting import hosted, weight_dtype

    return hosted(CharacterEncoder.from_pretrained(siglip, dinov2, dtype=weight_dtype()))


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
        from .instantcharacter.comfyui.hosting import progress

        return io.NodeOutput(load_adapter(locate("adapter", adapter, progress())))


def load_adapter(path: Path) -> HostedAdapter:
    """The adapter of this file, as a CHARACTER_ADAPTER."""
    from .instantcharacter import CharacterAdapter
    from .instantcharacter.comfyui.hosting import HostedAdapter, weight_dtype

    return HostedAdapter(CharacterAdapter.from_file(path, dtype=weight_dtype()))


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
        from .instantcharacter.character.image import prepare_reference
        from .instantcharacter.comfyui.hosting import say
        from .instantcharacter.comfyui.values import images, masks

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


def to_image(picture: Any) -> torch.Tensor:
    """A PIL picture as one of an IMAGE: [H, W, 3] in [0, 1]."""
    import numpy as np

    return torch.from_numpy(np.asarray(picture.convert("RGB")).astype(np.float32) / 255)


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


def encode(pictures: torch.Tensor, encoder: Any, adapter: HostedAdapter, fit: ResizeMode = "pad") -> HostedCharacter:
    """The character of one or several pictures of it, [B, H, W, C]."""
    from .instantcharacter.comfyui.hosting import HostedCharacter, load
    from .instantcharacter.comfyui.values import images

    pictures = images(pictures)
    look = load(encoder)
    views = [look(picture, fit) for picture in pictures]
    load(adapter.fusion)
    return HostedCharacter(adapter.adapter.create_character(*views, picture=pictures[0]), adapter)


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
        from .instantcharacter import Character

        path = comfy_folders.character_file(name)
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
                    options=comfy_folders.listed("characters"),
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
        from .instantcharacter import Character
        from .instantcharacter.comfyui.hosting import HostedCharacter

        character = Character.load(folder_paths.get_full_path_or_raise("characters", name))
        character.check_made_by(adapter.fingerprint)
        return io.NodeOutput(HostedCharacter(character, adapter), ui=shown(character, cls))


def shown(character: Any, node: type) -> Any:
    """The character's thumbnail, on its node."""
    return character.thumbnail and ui.PreviewImage(to_image(character.thumbnail)[None], cls=node)


class Sampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InstantCharacterSampler",
            display_name="InstantCharacter Sampler",
            category=CATEGORY,
            description="Draws the character: the library's own pipeline, self-contained. For every FLUX file, "
            "sampler, ControlNet and LoRA of ComfyUI, take InstantCharacter Apply and KSampler.",
            inputs=[
                FluxPipe.Input("flux_pipe", tooltip="From Load FLUX (InstantCharacter)."),
                CharacterType.Input("character", optional=True, tooltip="Who. Without a character this is plain FLUX."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    dynamic_prompts=True,
                    tooltip="What the character does, and where; a LoRA's trigger words first. Not what it looks like.",
                ),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    default="",
                    tooltip="What to keep out; counts only with true_cfg above 1.",
                ),
                io.Float.Input(
                    "true_cfg",
                    default=1.0,
                    min=1.0,
                    max=20.0,
                    step=0.1,
                    tooltip="Above 1, the negative prompt counts and each step takes twice as long.",
                ),
                io.Int.Input("width", default=1024, min=256, max=4096, step=16, tooltip="In pixels."),
                io.Int.Input("height", default=1024, min=256, max=4096, step=16, tooltip="In pixels."),
                io.Int.Input("steps", default=28, min=1, max=200, tooltip="28 for FLUX.1-dev, 4 for schnell."),
                io.Float.Input(
                    "guidance", default=3.5, min=0.0, max=100.0, step=0.1, tooltip="FLUX's own guidance: 2 to 4."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="The same seed draws the same picture.",
                ),
                io.Float.Input(
                    "scale",
                    default=0.9,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How strongly the character is drawn: 0.9 to begin with; 0.6 to 0.8 leaves more to the "
                    "prompt and to a style; 0 is plain FLUX.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the steps before which the character is left out.",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the steps after which it is left out.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Pictures at once."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="With an image or latent to begin with: how much of it is drawn anew.",
                ),
                io.Conditioning.Input("positive", optional=True, tooltip="In place of the prompt; FLUX's, and one."),
                io.Conditioning.Input("negative", optional=True, tooltip="In place of the negative prompt."),
                io.Image.Input("image", optional=True, tooltip="A picture to begin with; its size is taken."),
                io.Latent.Input("latent", optional=True, tooltip="A latent to begin with, in place of a picture."),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The picture."),
                io.Latent.Output(display_name="latent", tooltip="The picture as latents."),
            ],
        )

    @classmethod
    def execute(
        cls,
        flux_pipe: StyledPipeline,
        prompt: str,
        negative_prompt: str,
        true_cfg: float,
        width: int,
        height: int,
        steps: int,
        guidance: float,
        seed: int,
        scale: float,
        start: float,
        end: float,
        batch_size: int,
        denoise: float,
        character: HostedCharacter | None = None,
        positive: list | None = None,
        negative: list | None = None,
        image: torch.Tensor | None = None,
        latent: dict | None = None,
    ) -> io.NodeOutput:
        from .instantcharacter.comfyui.sampler import Prompt, init_from_inputs

        drawing = flux_pipe.draw(
            character,
            Prompt(positive or prompt, negative or negative_prompt, true_cfg),
            (width, height),
            steps,
            seed,
            init_from_inputs(image, latent, denoise),
            batch_size=batch_size,
            guidance_scale=guidance,
            subject_scale=scale,
            subject_start=start,
            subject_end=end,
        )
        return io.NodeOutput(drawing.image, {"samples": drawing.samples})


class Apply(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InstantCharacterApply",
            display_name="InstantCharacter Apply",
            category=CATEGORY,
            description="Puts a character on a FLUX.1 MODEL, for KSampler and everything else of ComfyUI. One after "
            "another, several characters come into one picture, each where its mask is.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="FLUX.1 (dev, schnell, Krea, Kontext), bf16, fp8 or GGUF, LoRAs and all."
                ),
                CharacterType.Input("character", tooltip="From InstantCharacter Encode or Load Character."),
                io.Float.Input(
                    "scale",
                    default=0.9,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How strongly the character is drawn: 0.9 to begin with; 0.6 to 0.8 leaves more to the "
                    "prompt and to a style; 0 leaves the MODEL as it is.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Part of the denoising before which the character is left out.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Part of the denoising after which it is left out.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where in the picture the character may be; stretched over the picture. One, or "
                    "one for each picture of a batch.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="To KSampler, or to another Apply.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        character: HostedCharacter,
        scale: float,
        start_percent: float,
        end_percent: float,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        from .instantcharacter.comfyui.model_patch import CharacterConditioning, apply
        from .instantcharacter.comfyui.values import masks

        who, adapter = character
        where = None if mask is None else masks(mask)
        return io.NodeOutput(
            apply(model, CharacterConditioning(adapter, who, scale, start_percent, end_percent, where))
        )


NODES: list[type[io.ComfyNode]] = [
    FluxLoader,
    EncoderLoader,
    AdapterLoader,
    PrepareReference,
    Encode,
    SaveCharacter,
    LoadCharacter,
    Sampler,
    Apply,
]


class InstantCharacterExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from .nodes_compat import NODES as COMPAT_NODES

        return [*NODES, *COMPAT_NODES]
