from __future__ import annotations

import pytest
import torch

from toy.data.pictures import batches
from toy.train.learning import learn
from toy.train.muon import Muon


@pytest.mark.parametrize("muon", [False, True])
def test_a_layer_learns_the_matrix_behind_its_targets(muon):
    torch.manual_seed(0)
    matrix, inputs = torch.randn(6, 6), torch.randn(64, 6)
    layer = torch.nn.Linear(6, 6)
    hidden = [layer.weight] if muon else []

    def loss(batch):
        return (layer(inputs[batch]).float() - inputs[batch] @ matrix).square().mean()

    indices = batches(64, 16, 300, seed=0)
    learned = learn("test", layer, indices, 300, loss, rate=3e-2, average=0.9, decay=0.0, hidden=hidden)
    assert (learned(inputs) - inputs @ matrix).square().mean().item() < 0.05


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_of_many_matrices_equals_torch_s():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 6), (6, 6), (12, 6), (6, 12))]
    theirs = [torch.nn.Parameter(matrix.detach().clone()) for matrix in ours]
    library = torch.optim.Muon(theirs, 1e-2, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    optimizers = Muon(ours, 1e-2, weight_decay=0.02), library
    for _ in range(10):
        for own, reference in zip(ours, theirs):
            own.grad, reference.grad = (gradient := torch.randn_like(own)), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for own, reference in zip(ours, theirs):
        torch.testing.assert_close(own, reference, atol=2e-3, rtol=0)  # ten updates of 1e-2 in bfloat16
        assert (own - reference).abs().mean() < 0.05 * 1e-2


def test_muon_takes_convolutions_as_matrices():
    torch.manual_seed(0)
    kernel = torch.nn.Parameter(torch.randn(4, 2, 3, 3))
    matrix = torch.nn.Parameter(kernel.detach().flatten(1).clone())
    kernel.grad = torch.randn_like(kernel)
    matrix.grad = kernel.grad.flatten(1).clone()
    for parameter in (kernel, matrix):
        Muon([parameter], 1e-2, weight_decay=0.0).step()
    assert torch.equal(kernel.flatten(1), matrix)
