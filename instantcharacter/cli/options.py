"""The options of each command as a frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..files import catalog
from ..model.strength import Scale, scales_of

Strategy = Literal["auto", "none", "model", "stream", "sequential"]
"""As in :mod:`instantcharacter.offload`, which imports torch."""
WeightDtype = Literal["default", "fp8_e4m3fn", "fp8_e4m3fn_fast"]
"""As in :mod:`instantcharacter.flux.fp8`, which imports torch."""
CACHE_THRESHOLD = 0.12
"""As in :mod:`instantcharacter.flux.first_block_cache`, which imports torch."""
SIZE, TOY_SIZE = (1024, 1024), (256, 256)
"""Width and height of a picture without ``--size``, with FLUX.1 and with the toy model."""
SOURCES = {"siglip": catalog.SIGLIP, "dinov2": catalog.DINOV2, "adapter": catalog.ADAPTER}
"""The models that make a character, and their default sources."""

_Encode = TypeVar("_Encode", bound="EncodeOptions")
_Picture = TypeVar("_Picture", bound="PictureOptions")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options that every command has.

    Attributes:
        verbose: whether to show the libraries' messages, and the traceback of an error.
    """

    verbose: bool = False


@dataclass(frozen=True, kw_only=True)
class EncodeOptions(Options):
    """How characters are made of reference pictures.

    Attributes:
        reference: paths of pictures, one for each character.
        mask: paths of masks, one for each reference, or none; white is the character.
        fit: how a picture becomes a square: padded with white, or stretched.
        output: the file to write.
        siglip, dinov2, adapter: a path, a hub id, or ``toy``.
        device, dtype: where and in which type models run; chosen for the machine if not given.
    """

    output: Path
    reference: tuple[str, ...] = ()
    mask: tuple[str, ...] = ()
    fit: Literal["pad", "stretch"] = "pad"
    siglip: str = catalog.SIGLIP
    dinov2: str = catalog.DINOV2
    adapter: str = catalog.ADAPTER
    device: str | None = None
    dtype: str | None = None

    def with_toy_paths(self: _Encode, everywhere: bool = False) -> _Encode:
        """These options with the toy models' paths in place of ``toy``.

        Args:
            everywhere: whether the toy models also replace the sources that are left at their defaults.

        Raises:
            FileNotFoundError: the toy models are missing.
        """
        chosen = {name: getattr(self, name) for name in SOURCES}
        toys = [name for name in chosen if chosen[name] in (catalog.TOY, SOURCES[name] if everywhere else catalog.TOY)]
        paths: dict[str, Any] = {name: str(catalog.toy(name)) for name in toys}
        return replace(self, **paths)


@dataclass(frozen=True, kw_only=True)
class PictureOptions(EncodeOptions):
    """How pictures of characters are generated.

    Attributes:
        character: paths of character files; these characters follow those of the references.
        scale: the strength of all characters, or of each.
        scale_double, scale_single: factors on it in FLUX's double and single blocks, for all or for each.
        steps: denoising steps.
        guidance: FLUX's distilled guidance.
        size: width and height in pixels, multiples of 16.
        seed: of the noise.
        lora: paths of LoRAs and their weights.
        model: FLUX.1 as a file, a diffusers folder, a hub id, or ``toy``, which makes the other models toys, too.
        clip_l, t5, vae: the files of FLUX's other parts, where ``model`` is a file.
        offload: the strategy, see :meth:`~instantcharacter.InstantCharacterPipeline.enable_character_offload`.
        vram: GiB of GPU memory to use at most.
        weight_dtype: of FLUX's large weights, see :func:`~instantcharacter.flux.load.load_flux`.
        compile: whether torch compiles FLUX.
        cache: threshold of :mod:`~instantcharacter.flux.first_block_cache`, which leaves out steps; 0 for no cache.
        parallel: how several processes compute a picture together, see :mod:`~instantcharacter.flux.parallel`; each
            its own if not given.
    """

    character: tuple[Path, ...] = ()
    scale: tuple[Scale, ...] = (0.9,)
    scale_double: tuple[float, ...] = (1.0,)
    scale_single: tuple[float, ...] = (1.0,)
    steps: int = 28
    guidance: float = 3.5
    size: tuple[int, int] = SIZE
    seed: int | None = None
    lora: tuple[tuple[Path, float], ...] = ()
    model: str = catalog.FLUX
    clip_l: Path | None = None
    t5: Path | None = None
    vae: Path | None = None
    offload: Strategy = "auto"
    vram: float | None = None
    weight_dtype: WeightDtype = "default"
    compile: bool = False
    cache: float = 0.0
    parallel: Literal["context"] | None = None

    @property
    def flux_parts(self) -> dict[str, Path | None]:
        """The files of FLUX's text encoders and VAE by name."""
        return {"clip_l": self.clip_l, "t5": self.t5, "vae": self.vae}

    def with_toy_paths(self: _Picture, everywhere: bool = False) -> _Picture:
        """See :meth:`EncodeOptions.with_toy_paths`; the toy FLUX comes with the other toy models."""
        if self.model != catalog.TOY:
            return super().with_toy_paths(everywhere)
        return replace(self, model=str(catalog.toy("flux"))).with_toy_paths(everywhere=True)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(PictureOptions):
    """What one picture shows, and where it goes; its seed is random if not given.

    Attributes:
        prompt: the text.
        save_character: where to write the reference's character.
        grid: settings to cross and their values, see :mod:`~instantcharacter.flux.sweep`; a picture of one setting if
            empty.
    """

    prompt: str
    save_character: Path | None = None
    grid: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def scales(self, characters: int) -> list[Scale]:
        """The strength of each character, see :func:`~instantcharacter.model.strength.scales_of`."""
        return scales_of(characters, self.scale, self.scale_double, self.scale_single)


@dataclass(frozen=True, kw_only=True)
class BatchOptions(PictureOptions):
    """Which pictures are generated into the folder ``output``; the other options count where a line has no value.

    Attributes:
        jobs: the file with a line for each picture, see :mod:`instantcharacter.batch.jobs`.
        negative_prompt, true_cfg: as in a line.
        batch_size: the most pictures at once; chosen for the memory plan if not given.
        skip_bad: whether to generate the good lines if there are bad ones.
    """

    jobs: Path
    negative_prompt: str | None = None
    true_cfg: float = 1.0
    batch_size: int | None = None
    skip_bad: bool = False


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Options):
    """Which adapter is written where.

    Attributes:
        adapter: a path or a hub id.
        output: a ``.safetensors`` or ``.bin``; beside the original if not given.
        dtype: the type of its weights; as in the original if not given, bfloat16 for a folded one.
        folded: whether to fold it, see :func:`~instantcharacter.model.folding.fold_adapter`.
    """

    adapter: str
    output: Path | None = None
    dtype: str | None = None
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class DownloadOptions(Options):
    """Which model files are downloaded.

    Attributes:
        file: names of :data:`instantcharacter.files.catalog.FILES`; all if empty.
        models: ComfyUI's models folder; that of the ComfyUI around the pack if not given.
    """

    file: tuple[str, ...] = ()
    models: Path | None = None


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Options):
    """Which stages are trained.

    Attributes:
        config: paths of YAML files, a stage each.
        prepare: how many samples to fill the cache for, in place of training.
    """

    config: tuple[Path, ...]
    prepare: int | None = None


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Options):
    """The demo's reference picture, and the PNG to write."""

    reference: Path
    output: Path
