"""Modules whose weights are on the device only while they run, on the CPU and on a pretended GPU."""

from __future__ import annotations

import functools

import pytest
import torch
from support.pretended_cuda import CPU, CUDA, PretendedCuda
from torch import nn

from instantcharacter.offload.host_weights import HostWeights, HostWeightsCache
from instantcharacter.offload.streaming import OffloadedModule, StreamedBlocks, is_offloaded, on_device


class Chain(nn.Module):
    """Linear blocks that run in a given order."""

    def __init__(self, order: tuple[int, ...] = (0, 1, 2, 3, 4)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        self.order = order

    def forward(self, x):
        x = self.embed(x)
        for i in self.order:
            x = self.blocks[i](x)
        return x


X = torch.linspace(-1, 1, 16).view(2, 8)


def offloaded(module: nn.Module, streamed=(), device=CPU, resident=False, on_out_of_memory=pytest.fail, **settings):
    return OffloadedModule(module, streamed, device, resident, False, on_out_of_memory, **settings)


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 0, 0, 3, 1)])
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("streamed", [(), (0,), (1, 3), (0, 1, 2, 3, 4)])
def test_any_blocks_in_any_order_compute_the_same(order, resident, streamed):
    model = Chain(order)
    expected = model(X)
    offloaded(model, [model.blocks[i] for i in streamed], resident=resident)
    assert torch.equal(model(X), expected)
    assert torch.equal(model(X), expected)


def test_a_module_runs_on_the_device_and_is_in_host_memory_again():
    model = Chain()
    expected = model(X)
    with PretendedCuda() as card:
        offload = offloaded(model, list(model.blocks), CUDA)
        output = model(X)
        assert output.device == CUDA
        assert torch.equal(output.cpu(), expected)
        assert {parameter.device for parameter in model.parameters()} == {CPU}
        offload.remove()
    assert not card.races


def test_removing_restores_forward():
    model = Chain()
    model.forward = functools.partial(Chain.forward, model)
    before = model.forward
    offload = offloaded(model)
    assert is_offloaded(model)
    offload.remove()
    assert model.forward is before
    plain = Chain()
    offloaded(plain).remove()
    assert "forward" not in vars(plain)


def test_removing_leaves_a_forward_that_others_put_around_it():
    """diffusers' hooks wrap the ``forward`` that they find, and put it back later."""
    model, calls = Chain(), []
    expected = model(X)
    offload = offloaded(model)
    inner = model.forward

    def wrapper(*args):
        calls.append(1)
        return inner(*args)

    model.forward = wrapper
    offload.remove()
    assert model.forward is wrapper
    model.embed.weight.data = model.embed.weight.data.clone()  # somebody else's to move now
    assert torch.equal(model(X), expected)
    assert calls == [1]
    model.forward = inner
    assert torch.equal(model(X), expected)


def test_a_module_is_not_offloaded_twice():
    model = Chain()
    offload = offloaded(model)
    with pytest.raises(RuntimeError, match="this Sequential is offloaded already"):
        offloaded(nn.Sequential(model))
    offload.remove()
    offloaded(model)


def test_out_of_memory_runs_the_module_again():
    model, reasons = Chain(), []
    expected = model(X)

    def fail_once(*_):
        if not reasons:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.blocks[2].register_forward_pre_hook(fail_once)
    offloaded(model, list(model.blocks), on_out_of_memory=reasons.append)
    assert torch.equal(model(X), expected)
    assert reasons == ["CUDA out of memory"]


def test_host_memory_is_used_again_under_another_plan():
    model, cache = Chain(), HostWeightsCache()
    first = offloaded(model, list(model.blocks), host_weights=cache)
    before = [block.weight.data_ptr() for block in model.blocks]
    first.remove()
    offloaded(model, list(model.blocks)[:2], resident=True, host_weights=cache)
    after = [block.weight.data_ptr() for block in model.blocks]
    assert after[:2] == before[:2]


def test_offloaded_modules_move_by_themselves():
    layer = nn.Linear(4, 4)
    offloaded(layer)
    address = layer.weight.data_ptr()
    with on_device(layer, torch.device("meta")):
        assert layer.weight.data_ptr() == address


def test_a_module_on_a_device_gets_its_original_tensors_back():
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    module.register_buffer("unsaved", torch.ones(2), persistent=False)
    before = dict([*module.named_parameters(), *module.named_buffers()])
    addresses = {name: tensor.data_ptr() for name, tensor in before.items()}
    with on_device(module, torch.device("meta")):
        assert module[0].weight.is_meta
    after = dict([*module.named_parameters(), *module.named_buffers()])
    assert all(after[name] is tensor for name, tensor in before.items())
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == addresses
    assert "unsaved" not in module.state_dict()


def test_a_module_is_converted_on_the_device_and_gets_its_tensors_back():
    module = nn.Sequential(nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64)).to(torch.float16)
    addresses = [tensor.data_ptr() for tensor in module.state_dict().values()]
    size = sum(tensor.nbytes for tensor in module.state_dict().values())
    with PretendedCuda() as card:
        with on_device(module, CUDA, torch.float32) as there:
            assert {tensor.dtype for tensor in there.parameters()} == {torch.float32}
            assert there[1].num_batches_tracked.dtype == torch.int64
            assert {tensor.device for tensor in there.state_dict().values()} == {CUDA}
            assert 1.9 * size < card.allocated < 2.1 * size
        assert card.allocated == 0
    assert {tensor.dtype for tensor in module.parameters()} == {torch.float16}
    assert [tensor.data_ptr() for tensor in module.state_dict().values()] == addresses


def test_a_module_gets_its_tensors_back_after_an_error():
    module = nn.Linear(3, 3)
    address = module.weight.data_ptr()
    with pytest.raises(KeyError), on_device(module, torch.device("meta")):
        raise KeyError
    assert module.weight.data_ptr() == address


def test_no_streamed_blocks_need_no_streams():
    with StreamedBlocks([], CPU, False).running():
        pass


def copies(blocks: StreamedBlocks, monkeypatch) -> list[int]:
    """The sizes of all copies of weights to the device, from now on."""
    made: list[int] = []
    copy_to = HostWeights.copy_to
    monkeypatch.setattr(HostWeights, "copy_to", lambda self, slot: made.append(self.size) or copy_to(self, slot))
    return made


def test_blocks_that_are_prefetched_come_once_a_round(monkeypatch):
    model = Chain()
    expected = model.blocks[0](X)
    with PretendedCuda() as card:
        blocks = StreamedBlocks(model.blocks, CUDA, True)
        made = copies(blocks, monkeypatch)
        with blocks.running():
            for _ in range(3):
                for i, block in enumerate(model.blocks):
                    blocks.prefetch(i)
                    blocks.load(i)
                    output = block(X.to(CUDA))
                    assert i or torch.equal(output.cpu(), expected)
        assert len(made) == 3 * len(model.blocks) + 1
        assert {parameter.device for parameter in model.parameters()} == {CPU}
        assert not card.races


def test_a_block_that_is_left_out_costs_its_own_copy_alone(monkeypatch):
    """As another node leaves a block of FLUX out."""
    model = Chain()
    with PretendedCuda() as card:
        blocks = StreamedBlocks(model.blocks, CUDA, True)
        with blocks.running():
            for order in ((0, 2, 3, 4), (0, 1, 2, 3, 4), (0, 1, 2, 3, 4)):
                made = copies(blocks, monkeypatch)
                for i in order:
                    blocks.prefetch(i)
                    before = len(made)
                    blocks.load(i)
                    assert len(made) == before
                assert len(made) <= len(model.blocks)
                monkeypatch.undo()
        assert not card.races


def test_blocks_stream_where_the_device_lacks_the_memory_for_all():
    model = Chain()
    expected = [block(X) for block in model.blocks]
    with PretendedCuda() as card:
        blocks = StreamedBlocks(model.blocks, CUDA, True)
        card.capacity = card.allocated + blocks.size - 1
        with blocks.running(resident=True):
            assert not blocks.resident
            for i, block in enumerate(model.blocks):
                blocks.load(i)
                assert torch.equal(block(X.to(CUDA)).cpu(), expected[i])
        assert not card.races


def test_blocks_that_were_not_prefetched_come_all_the_same():
    model = Chain()
    expected = [block(X) for block in model.blocks]
    with PretendedCuda() as card:
        blocks = StreamedBlocks(model.blocks, CUDA, True)
        with blocks.running():
            for i in (4, 0, 0, 3, 1, 4):
                blocks.load(i)
                assert torch.equal(model.blocks[i](X.to(CUDA)).cpu(), expected[i])
        assert not card.races


def test_resident_blocks_come_once(monkeypatch):
    model = Chain()
    expected = [block(X) for block in model.blocks]
    with PretendedCuda() as card:
        blocks = StreamedBlocks(model.blocks, CUDA, True)
        made = copies(blocks, monkeypatch)
        before = card.allocated
        with blocks.running(resident=True):
            for i in (4, 0, 0, 3, 1, 4):
                blocks.prefetch(i)
                blocks.load(i)
                assert torch.equal(model.blocks[i](X.to(CUDA)).cpu(), expected[i])
            assert card.allocated - before >= blocks.size
        assert len(made) == len(model.blocks)
        assert card.allocated == before
        assert not card.races


def test_a_failed_run_leaves_the_weights_in_host_memory():
    model = Chain()
    with PretendedCuda() as card:
        blocks = StreamedBlocks(model.blocks, CUDA, True)
        with pytest.raises(KeyboardInterrupt), blocks.running():
            blocks.load(2)
            raise KeyboardInterrupt
        assert {parameter.device for parameter in model.parameters()} == {CPU}
        assert not card.races


def test_blocks_stream_to_another_gpu_than_the_current_one():
    model, second = Chain(), torch.device("cuda", 1)
    expected = [block(X) for block in model.blocks]
    with PretendedCuda(devices=2) as card:
        blocks = StreamedBlocks(model.blocks, second, True)
        with blocks.running():
            for i, block in enumerate(model.blocks):
                blocks.prefetch(i)
                blocks.load(i)
                assert torch.equal(block(X.to(second)).cpu(), expected[i])
        assert card.contexts == {1}
        assert not card.races
