"""The nodes that load an example picture, and cut a character out of a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io, ui
from torch.nn.functional import interpolate

from ...files.catalog import EXAMPLES, example
from ..folders import background_removal_file
from ..images import load_image, to_batch, to_image
from .types import CATEGORY, Node, fraction_input

if TYPE_CHECKING:
    from ...character.image import Keep
    from ..reference import ReferenceFit

PREVIEW = 2048
"""Maximum side of the reference in the preview on the node; ComfyUI makes several copies of it."""


class LoadExample(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InstantCharacterExample",
            display_name="Load Example Picture",
            category=CATEGORY,
            description="Loads a picture of a character that comes with the pack, as Load Image does: for a first try "
            "without a picture of one's own.",
            inputs=[
                io.Combo.Input(
                    "name",
                    options=list(EXAMPLES),
                    tooltip="character.png is a fox and owl.png an owl, both without a background. monster.png is for "
                    "the toy models, which know cartoon characters like it.",
                )
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="For Prepare Character Reference."),
                io.Mask.Output(display_name="mask", tooltip="White where the picture is transparent, as Load Image's."),
            ],
        )

    @classmethod
    def run(cls, name: str) -> io.NodeOutput:
        from ...files.pictures import open_picture

        path = example(name)
        on_white = to_image(open_picture(path))[None]
        return io.NodeOutput(*load_image(path), ui=ui.PreviewImage(on_white, cls=cls))


class PrepareReference(Node):
    def __init__(self) -> None:
        from ..reference import background_removal_cache

        super().__init__()
        self.cache = background_removal_cache()  # ComfyUI keeps the node, and the node keeps the cache

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InstantCharacterPrepareReference",
            display_name="Prepare Character Reference",
            category=CATEGORY,
            description="Cuts the character out onto a white square, for the encoders. The likeness is best if the "
            "reference shows the whole character, large and alone.",
            inputs=[
                io.Image.Input("image", tooltip="The reference picture; in a batch, every picture."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the character is: the mask of Load Image (painted over the character, or of a "
                    "transparent picture), or of a background removal node. Any size. An empty mask is ignored.",
                ),
                fraction_input(
                    "margin",
                    0.05,
                    0.01,
                    "White margin around a character that is cut out, as a fraction of its longer side.",
                ),
                io.Combo.Input(
                    "fit",
                    options=["auto", "pad", "stretch"],
                    tooltip="Without a mask: how the picture becomes a square. auto: the character cut out, if "
                    "ComfyUI has a background removal model, otherwise as pad. pad: the whole picture, with white "
                    "borders. stretch: the whole picture, distorted, as in the reference implementation. The node "
                    "shows what it did.",
                ),
                io.Combo.Input(
                    "keep",
                    options=["auto", "white", "black"],
                    optional=True,
                    tooltip="Which side of the mask is the character. auto: white, unless white is transparent or the "
                    "background around the character. The node shows which side it kept.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Image.Output(display_name="reference", tooltip="The character on a white square.")],
        )

    @classmethod
    def fingerprint_inputs(cls, fit: ReferenceFit = "auto", **_: Any) -> str:
        """ComfyUI runs the node again when the background removal model appears, changes or disappears."""
        file = background_removal_file() if fit == "auto" else None
        return f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" if file else ""

    @classmethod
    def run(
        cls,
        image: torch.Tensor,
        margin: float,
        fit: ReferenceFit,
        mask: torch.Tensor | None = None,
        keep: Keep = "auto",
    ) -> io.NodeOutput:
        from ..progress import progress, show_text
        from ..reference import prepare

        alphas: Any = [None] * len(image)
        if mask is not None:
            if len(mask) not in (1, len(image)):
                raise ValueError(f"{len(mask)} masks for {len(image)} pictures; expected one for all, or one each")
            alphas = mask.expand(len(image), -1, -1)
        report, prepared = progress(), []
        for i, pair in enumerate(zip(image, alphas)):
            report(i, len(image))
            prepared.append(prepare(*pair, margin, fit, keep))
        side = max(square.width for square, _ in prepared)
        references = [square for square, _ in prepared]
        reference = to_batch([each if each.width == side else each.resize((side, side)) for each in references])
        text = "\n".join(dict.fromkeys(description for _, description in prepared))
        show_text(cls, text)
        return io.NodeOutput(reference, ui={**ui.PreviewImage(preview(reference), cls=cls).as_dict(), "text": (text,)})


def preview(batch: torch.Tensor) -> torch.Tensor:
    """An IMAGE of squares for a preview: as it is, or shrunk to :data:`PREVIEW` pixels a side."""
    if batch.shape[1] <= PREVIEW:
        return batch
    return interpolate(batch.movedim(-1, 1), (PREVIEW, PREVIEW), mode="area").movedim(1, -1)
