from __future__ import annotations

import pytest
import torch

from instantcharacter.offload.streaming import on_device


def test_weights_return_to_their_device_after_an_error(adapter):
    adapter.register_buffer("note", torch.ones(2))
    before = {name: tensor.data_ptr() for name, tensor in adapter.state_dict().items()}
    with pytest.raises(RuntimeError, match="in the block"), on_device(adapter, torch.device("meta")) as module:
        assert module is adapter
        assert all(tensor.is_meta for tensor in adapter.state_dict().values())
        raise RuntimeError("in the block")
    assert {name: tensor.data_ptr() for name, tensor in adapter.state_dict().items()} == before
