"""Folders of FLUX and the encoders, single files of encoders, and the state of a training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import FluxTransformer2DModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from support import mutations, recorded, single_files, tiny
from support.training_world import SIZES

from instantcharacter import CharacterAdapter, InstantCharacterPipeline
from instantcharacter.flux.load import FluxFiles, load_flux
from instantcharacter.training.checkpoint import STATE, Checkpoint, Progress, names_in_adapter
from instantcharacter.training.flow import CharacterFlow

FILES = [
    "model_index.json",
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
]


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    InstantCharacterPipeline(**tiny.tiny_components()).save_pretrained(folder)
    return folder


@given(st.data())
def test_changed_json_of_flux(outcomes, flux, data):
    path = flux / data.draw(st.sampled_from(FILES))
    good = path.read_bytes()
    weights = load_file(flux / "transformer/diffusion_pytorch_model.safetensors")
    changed = data.draw(mutations.json_bytes(json.loads(good)))

    def is_right(pipeline) -> bool:
        state = pipeline.transformer.state_dict()
        return state.keys() == weights.keys() and all(torch.equal(state[key], weights[key]) for key in weights)

    try:
        outcomes.judge(mutations.write(path, changed, lambda _: load_flux(FluxFiles(flux), torch.float32)), is_right)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("transformer/config.json", {"num_layers": 10**9}),
        ("transformer/config.json", {"num_single_layers": 2**62}),
        ("transformer/config.json", {"joint_attention_dim": 2**40}),
        ("vae/config.json", {"layers_per_block": 10**9}),
        ("vae/config.json", {"block_out_channels": [10**9] * 4}),
        ("vae/config.json", {"scaling_factor": float("nan")}),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}),
        ("text_encoder/config.json", {"max_position_embeddings": 2**20, "hidden_size": 2**20}),
        ("text_encoder_2/config.json", {"num_layers": 10**9}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}),
    ],
)
def test_impossible_sizes_are_refused_at_once(outcomes, flux, file, changes):
    good = (flux / file).read_bytes()
    (flux / file).write_text(json.dumps({**json.loads(good), **changes}))
    try:
        assert outcomes.judge(lambda: load_flux(FluxFiles(flux), torch.float32)) == "clear"
    finally:
        (flux / file).write_bytes(good)


@pytest.fixture(scope="module", params=single_files.MODELS)
def encoder(request, tmp_path_factory) -> tuple:
    """A model of one file, the file's folder, and its bytes."""
    model, state, config = single_files.single_file_models()[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    config.save_pretrained(folder)
    good = save({key: weight.float().clone() for key, weight in state.items()})
    (folder / "model.safetensors").write_bytes(good)
    return model, folder, good


def loaded(model):
    """Loads a model from a file or a folder."""

    def load(path: Path):
        return model.load(path, model.read_config(path), torch.float32)

    return load


@given(st.data())
def test_changed_weights_of_encoders(outcomes, encoder, data):
    model, folder, good = encoder
    changed = data.draw(mutations.edited_safetensors(good))

    def is_right(loaded_model) -> bool:
        return all(weight.detach().numpy().tobytes() in changed for weight in loaded_model.parameters())

    whole = data.draw(st.booleans())
    path = folder / "model.safetensors"
    try:
        call = loaded(model)
        outcomes.judge(mutations.write(path, changed, lambda path: call(folder if whole else path)), is_right)
    finally:
        path.write_bytes(good)


@given(st.data())
def test_changed_configs_of_encoders(outcomes, encoder, data):
    model, folder, _ = encoder
    path = folder / "config.json"
    good = path.read_bytes()
    changed = data.draw(mutations.json_bytes(json.loads(good)))
    whole = data.draw(st.booleans())
    try:
        call = mutations.write(
            path, changed, lambda path: loaded(model)(folder if whole else folder / "model.safetensors")
        )
        outcomes.judge(call, lambda loaded_model: mutations.finite(*loaded_model.parameters()))
    finally:
        path.write_bytes(good)


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> tuple:
    """A checkpoint, what it restores, and its good state."""
    folder = tmp_path_factory.mktemp("training")
    accelerator = Accelerator(cpu=True)
    sizes = {"attention_head_dim": 32, "num_attention_heads": 2, "axes_dims_rope": (4, 14, 14)}
    flux = FluxTransformer2DModel(
        **{**recorded.CONFIG["transformer"], **sizes, "num_layers": 1, "num_single_layers": 1}
    )
    adapter = CharacterAdapter(SIZES)
    flow = CharacterFlow(flux, adapter, checkpointing=False)
    names = names_in_adapter(flow, adapter)
    trained = [parameter for parameter in flow.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    checkpoint = Checkpoint(folder, 1, SIZES, names)
    average = [parameter.detach().clone() for parameter in trained]
    checkpoint.save(accelerator, flow, optimizer, Progress(3, 12, average))
    return (lambda: checkpoint.load(accelerator, flow, optimizer)), folder / STATE, (folder / STATE).read_bytes()


def is_progress(progress: Progress) -> bool:
    return type(progress.step) is int and mutations.finite(progress.losses, *progress.average)


@given(st.data())
def test_changed_bytes_of_states(outcomes, training, data):
    load, path, good = training
    changed = data.draw(mutations.edited_bytes(good, 60_000))
    outcomes.judge(mutations.write(path, changed, lambda _: load()), is_progress)


ODD = st.one_of(
    mutations.ODD,
    st.sampled_from([torch.ones(2), torch.tensor(float("nan")), torch.ones(3, dtype=torch.int64), torch.ones(0)]),
)


@given(st.data())
def test_changed_content_of_states(outcomes, training, tmp_path, data):
    load, path, good = training
    path.write_bytes(good)
    state = torch.load(path, weights_only=True)
    key = data.draw(st.sampled_from([*state, *state]))
    if isinstance(state[key], (dict, list)) and state[key] and data.draw(st.booleans()):
        state[key] = data.draw(mutations.edited_json(state[key], ODD))
    elif data.draw(st.booleans()):
        state[key] = data.draw(ODD)
    else:
        del state[key]
    torch.save(state, path)
    outcomes.judge(load, is_progress)


def test_good_files_are_right(outcomes, flux, encoder, training):
    load, path, good = training
    path.write_bytes(good)
    assert outcomes.judge(load, lambda progress: is_progress(progress) and progress.step == 3) == "right"
    model, folder, _ = encoder
    assert outcomes.judge(lambda: loaded(model)(folder)) == "right"
    assert outcomes.judge(lambda: loaded(model)(folder / "model.safetensors")) == "right"
    assert outcomes.judge(lambda: load_flux(FluxFiles(flux), torch.float32)) == "right"
