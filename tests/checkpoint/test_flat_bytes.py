"""The bytes of tensors of any stride, against NumPy."""

import numpy as np
import pytest
import torch

from daq_lightning.checkpoint.fingerprint import fingerprint
from daq_lightning.checkpoint.flat_bytes import flat_bytes, tensor_bytes
from daq_lightning.checkpoint.layouts.int32 import pack_rows, unpack_rows

GRID = torch.arange(28, dtype=torch.int32).reshape(4, 7)


@pytest.mark.parametrize(
    "tensor",
    [
        GRID,
        GRID.T,
        GRID[:, 1:2],
        GRID[1:2].T,
        GRID[:1, ::7],  # one element, of stride 7: contiguous to torch
        GRID[0][::7],
        GRID[2, 3],
        GRID[:0],
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)} {tensor.stride()}",
)
def test_bytes_are_those_of_numpy(tensor):
    wanted = np.ascontiguousarray(tensor.numpy()).tobytes()
    assert bytes(tensor_bytes(tensor)) == bytes(flat_bytes(tensor).tolist()) == wanted
    assert fingerprint(tensor) == fingerprint(tensor.clone(memory_format=torch.contiguous_format))


def test_bytes_of_a_contiguous_tensor_are_no_copy():
    assert flat_bytes(GRID[1:]).data_ptr() == GRID[1:].data_ptr()


@pytest.mark.parametrize("stride", [1, 4])
def test_a_column_of_packed_codes_is_unpacked_whatever_its_stride(stride):
    codes = torch.arange(-8, -1, dtype=torch.int8)[:, None]
    packed = pack_rows(codes).expand(7, stride).contiguous()[:, :1]
    assert packed.stride() == (stride, 1)
    assert torch.equal(unpack_rows(packed, 1), codes)
