from __future__ import annotations

import torch
from support import training_world as world

from instantcharacter import CharacterAdapter, InstantCharacterPipeline
from instantcharacter.flux.latents import img_ids
from instantcharacter.model.conditioning import Subject
from instantcharacter.training import train
from instantcharacter.training.data.examples import Examples
from instantcharacter.training.flow import CharacterFlow, zero_values


def test_a_new_adapter_leaves_flux_unchanged(config):
    transformer = world.new_flux(config)
    noisy, sigmas = torch.randn(1, 16, 32), torch.tensor([0.5])
    prompts, pooled = torch.randn(1, 32, 96), torch.randn(1, 96)
    plain = transformer(
        hidden_states=noisy,
        timestep=sigmas,
        guidance=torch.ones(1),
        encoder_hidden_states=prompts,
        pooled_projections=pooled,
        txt_ids=torch.zeros(32, 3),
        img_ids=img_ids(4, 4),
    ).sample
    flow = CharacterFlow(transformer, zero_values(CharacterAdapter(config.sizes)), checkpointing=False)
    features = torch.randn(1, 12, 96), torch.randn(1, 4, 96), torch.randn(1, 16, 96)
    torch.testing.assert_close(flow(noisy, sigmas, torch.ones(1), prompts, pooled, features, img_ids(4, 4)), plain)


def test_checkpointing_gives_the_same_gradients(config):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        flow = CharacterFlow(world.new_flux(config), CharacterAdapter(config.sizes), checkpointing)
        features = torch.randn(2, 12, 96), torch.randn(2, 4, 96), torch.randn(2, 16, 96)
        noisy, prompts, pooled = torch.randn(2, 16, 32), torch.randn(2, 32, 96), torch.randn(2, 96)
        velocity = flow(noisy, torch.tensor([0.2, 0.9]), torch.ones(2), prompts, pooled, features, img_ids(4, 4))
        velocity.square().mean().backward()
        gradients.append([parameter.grad for parameter in flow.parameters() if parameter.requires_grad])
    assert gradients[0]
    for stored, recomputed in zip(*gradients):
        assert stored.abs().max() > 0
        torch.testing.assert_close(stored, recomputed)


def test_the_flow_predicts_what_the_pipeline_does(config, models):
    """The unfolded attention of training and the folded one of generating give the same velocity."""
    path = train(config)
    pipeline = InstantCharacterPipeline.from_pretrained(str(models / "flux"))
    pipeline.set_progress_bar_config(disable=True)
    adapter = CharacterAdapter.from_file(path)
    assert adapter.config == world.SIZES
    pipeline.set_character_adapter(adapter)
    batch, _ = next(Examples(config, torch.device("cpu")).batches(0))
    noisy, sigma, positions = batch.latents[:1], torch.tensor([0.6]), img_ids(4, 4)
    flow = CharacterFlow(world.new_flux(config), CharacterAdapter.from_file(path), checkpointing=False)
    features = tuple(part[:1] for part in batch.features)
    trained = flow(noisy, sigma, torch.tensor([3.5]), batch.prompts[:1], batch.pooled[:1], features, positions)
    tokens = adapter.projector.resample(adapter.projector.fuse(*features), 1000 * sigma, folded=True)
    generated = pipeline.transformer(
        hidden_states=noisy,
        timestep=sigma,
        guidance=torch.tensor([3.5]),
        encoder_hidden_states=batch.prompts[:1],
        pooled_projections=batch.pooled[:1],
        txt_ids=torch.zeros(32, 3),
        img_ids=positions,
        joint_attention_kwargs={"subjects": [Subject(tokens, torch.tensor(1.0))], "image_tokens": 16},
    ).sample
    torch.testing.assert_close(generated, trained, atol=1e-4, rtol=1e-4)
