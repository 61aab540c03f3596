"""Groups hold the elements that the granularity names, once each."""

import numpy as np
import pytest
import torch

from daq_lightning.numerics.formats import PerBlock, PerChannel, PerTensor
from daq_lightning.numerics.tiling import bands, group_sizes, patches, scale_of_rows, to_groups

GRANULARITIES = [PerTensor(), PerChannel(), PerBlock(4, 3), PerBlock(1, 5), PerBlock(128, 128)]
SHAPES = [(1, 1), (8, 6), (9, 7), (3, 2), (1, 13), (13, 1)]


def slices_of(shape, granularity):
    """The groups as pairs of slices, in the order of the scale tensor."""
    if isinstance(granularity, PerTensor):
        return [(slice(0, shape[0]), slice(0, shape[1]))]
    rows, cols = (
        (1, shape[1]) if isinstance(granularity, PerChannel) else (granularity.rows, granularity.cols)
    )
    return [
        (slice(top, min(top + rows, shape[0])), slice(left, min(left + cols, shape[1])))
        for top in range(0, shape[0], rows)
        for left in range(0, shape[1], cols)
    ]


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_groups_hold_their_elements_and_zeros_only(shape, granularity):
    weight = torch.arange(1, shape[0] * shape[1] + 1).reshape(shape)
    groups = to_groups(weight, granularity)
    expected = slices_of(shape, granularity)
    assert groups.shape[0] == len(expected) == int(np.prod(granularity.grid(shape)))
    for group, where in zip(groups, expected, strict=True):
        assert sorted(group[group != 0].tolist()) == sorted(weight[where].flatten().tolist())


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_group_sizes_count_the_real_elements(shape, granularity):
    sizes = group_sizes(shape, granularity)
    expected = [
        (rows.stop - rows.start) * (cols.stop - cols.start) for rows, cols in slices_of(shape, granularity)
    ]
    assert sizes.dtype == torch.int64
    assert sizes.tolist() == expected


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("elements", [1, 20, 1 << 20])
def test_bands_are_whole_groups_and_cover_every_row_once(shape, granularity, elements):
    cut = list(bands(shape, granularity, elements))
    assert [row for band in cut for row in range(band.start, band.stop)] == list(range(shape[0]))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    in_bands = torch.cat([to_groups(weight[band], granularity) for band in cut])
    assert torch.equal(in_bands, to_groups(weight, granularity))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("elements", [1, 20, 1 << 20])
def test_patches_are_small_and_hold_every_group_once_and_in_order(shape, granularity, elements):
    cut = list(patches(shape, granularity, elements))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    in_patches = torch.cat([to_groups(weight[patch], granularity) for patch, _ in cut])
    assert torch.equal(in_patches, to_groups(weight, granularity))
    assert [group for _, groups in cut for group in range(groups.start, groups.stop)] == list(
        range(len(in_patches))
    )
    cell = granularity.cell(shape)
    assert all(weight[patch].numel() <= max(elements, cell[0] * cell[1]) for patch, _ in cut)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_element_meets_the_scale_of_its_group(shape, granularity):
    grid = granularity.grid(shape)
    scale = torch.arange(1.0, 1 + grid[0] * grid[1]).reshape(grid)
    expected = torch.zeros(shape)
    for value, where in zip(scale.flatten(), slices_of(shape, granularity), strict=True):
        expected[where] = value
    for rows in (slice(0, shape[0]), slice(shape[0] // 2, shape[0]), slice(0, 1)):
        height = rows.stop - rows.start
        scales = scale_of_rows(scale, rows, shape, granularity).expand(height, shape[1])
        assert torch.equal(scales, expected[rows])


@pytest.mark.parametrize(("rows", "cols"), [(0, 128), (128, -1)])
def test_a_block_without_elements_is_refused(rows, cols):
    with pytest.raises(ValueError, match="at least 1"):
        PerBlock(rows, cols)
