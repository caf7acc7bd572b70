import math

import pytest
import torch
from torch.nn import functional as F

from pathsegdiff.config import ALL_TAPS
from pathsegdiff.grid import patchwise_matrix
from pathsegdiff.segmentation.head import FCNHead, FeatureBatch, HeadLevel
from pathsegdiff.segmentation.runs import head_parameters

#: (channels, stride) of a small model with the paper's structure.
SHAPES = dict(
    zip(
        ALL_TAPS,
        zip(
            (6, 5, 5, 5, 4, 4, 4, 3, 3, 3, 2, 2, 2),
            (32,) * 3 + (16,) * 3 + (8,) * 3 + (4,) * 4,
            strict=True,
        ),
        strict=True,
    )
)
PATCH_PX = 64


def make_levels(taps, strides=None):
    """Levels of the taps, finest first; ``strides`` overrides those of the model."""
    found = {}
    for tap in taps:
        channels, stride = SHAPES[tap]
        found.setdefault((strides or {}).get(tap, stride), []).append((tap, channels))
    return tuple(
        HeadLevel(name=f"stride_{stride}", stride=stride, taps=tuple(found[stride]))
        for stride in sorted(found)
    )


def make_batch(levels, batch, rows, columns, generator):
    """Random features of a grid of patches, and the dense map f made the plain way."""
    arrays, row_weights, column_weights, dense = {}, {}, {}, {}
    for level in levels:
        cells = PATCH_PX // level.stride
        x = torch.randn(batch, level.channels, rows * cells, columns * cells, generator=generator)
        arrays[level.name] = x
        row_weights[level.name] = torch.from_numpy(patchwise_matrix(rows, cells, PATCH_PX // 4))[
            None
        ]
        column_weights[level.name] = torch.from_numpy(
            patchwise_matrix(columns, cells, PATCH_PX // 4)
        )[None]
        patches = x.unfold(2, cells, cells).unfold(3, cells, cells).permute(0, 2, 3, 1, 4, 5)
        upsampled = F.interpolate(
            patches.flatten(0, 2), size=PATCH_PX // 4, mode="bilinear", align_corners=False
        )
        side = PATCH_PX // 4
        upsampled = upsampled.view(batch, rows, columns, level.channels, side, side)
        stitched = upsampled.permute(0, 3, 1, 4, 2, 5).reshape(
            batch, level.channels, rows * side, columns * side
        )
        start = 0
        for tap, channels in level.taps:
            dense[tap] = stitched[:, start : start + channels]
            start += channels
    f = torch.cat([dense[tap] for tap in ALL_TAPS if tap in dense], dim=1)
    return FeatureBatch(levels=arrays, rows=row_weights, columns=column_weights), f


def relative(first, second):
    return float(((first - second).norm() / second.norm()).detach())


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [(2, 17_467_842), (3, 17_468_419), (5, 17_469_573), (6, 17_470_150), (7, 17_470_727)],
)
def test_the_head_has_the_parameters_of_the_paper(outputs, expected):
    with torch.device("meta"):
        level = HeadLevel(name="stride_4", stride=4, taps=(("up_11", 7296),))
        head = FCNHead([level], outputs)
    assert sum(parameter.numel() for parameter in head.parameters()) == expected
    assert head_parameters(7296, outputs, 256) == expected


def test_the_layers_are_those_of_the_paper():
    with torch.device("meta"):
        head = FCNHead([HeadLevel(name="stride_4", stride=4, taps=(("up_11", 7296),))], 6)
    sizes = [
        sum(parameter.numel() for parameter in module.parameters()) for module in head.children()
    ]
    assert sizes == [16_810_240, 512, 524_416, 256, 131_136, 128, 3_462]


@pytest.mark.parametrize(
    "taps",
    [
        ALL_TAPS,
        ("middle",),
        ("up_11",),
        ("up_03", "up_08"),
        ("middle", "up_02", "up_05", "up_07"),
    ],
)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 3)])
def test_folded_and_plain_form_give_the_same_logits_and_gradients(taps, rows, columns, generator):
    levels = make_levels(taps)
    batch, f = make_batch(levels, 2, rows, columns, generator)
    torch.manual_seed(1)
    head = FCNHead(levels, 3, width=8)
    target = torch.randint(0, 3, (2, rows * PATCH_PX, columns * PATCH_PX), generator=generator)
    outcomes = []
    for forward in (lambda: head(batch), lambda: head.forward_dense(f)):
        head.zero_grad()
        logits = forward()
        F.cross_entropy(logits, target).backward()
        outcomes.append((logits.detach(), [p.grad.clone() for p in head.parameters()]))
    (folded, folded_grads), (plain, plain_grads) = outcomes
    assert folded.shape == (2, 3, rows * PATCH_PX, columns * PATCH_PX)
    assert relative(folded, plain) < 1e-5
    largest = max(float(grad.norm()) for grad in plain_grads)
    for first, second in zip(folded_grads, plain_grads, strict=True):
        # A bias before a batch norm has no gradient but rounding: hold it against the largest.
        assert float((first - second).norm()) < 1e-4 * max(float(second.norm()), 1e-2 * largest)


def test_folded_and_plain_form_agree_where_channels_are_standardised(generator):
    levels = make_levels(ALL_TAPS)
    batch, f = make_batch(levels, 1, 2, 2, generator)
    torch.manual_seed(0)
    head = FCNHead(levels, 2, width=32).eval()
    unchanged = head(batch)
    head.set_normalization(
        {
            level.name: (
                torch.randn(level.channels, generator=generator),
                torch.rand(level.channels, generator=generator) + 0.5,
            )
            for level in levels
        }
    )
    assert relative(head(batch), unchanged) > 0.01
    assert relative(head(batch), head.forward_dense(f)) < 1e-5


def test_standardised_features_have_mean_0_and_deviation_1(generator):
    level = HeadLevel(name="stride_4", stride=4, taps=(("up_10", 2), ("up_11", 1)))
    head = FCNHead([level], 2, width=4)
    x = torch.randn(1, 3, 16, 16, generator=generator) * 3 + 7
    mean, std = x.mean(dim=(0, 2, 3)), x.std(dim=(0, 2, 3), correction=0)
    head.set_normalization({"stride_4": (mean, std)})
    seen = head._standardise(x, slice(None))
    torch.testing.assert_close(seen.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.std(dim=(0, 2, 3), correction=0), torch.ones(3))


def test_statistics_are_buffers_and_no_parameters():
    head = FCNHead(make_levels(ALL_TAPS), 2, width=8)
    assert "feature_mean" in head.state_dict()
    assert "feature_mean" not in dict(head.named_parameters())


def test_taps_of_one_level_that_are_not_neighbours_in_the_dense_map_keep_their_places(generator):
    # No real model has such strides; the dense order must hold nevertheless.
    levels = make_levels(
        ("middle", "up_05", "up_11"), strides={"middle": 8, "up_05": 4, "up_11": 8}
    )
    batch, f = make_batch(levels, 1, 2, 1, generator)
    head = FCNHead(levels, 2, width=8).eval()
    assert relative(head(batch), head.forward_dense(f)) < 1e-5


def test_a_level_of_stride_64_is_read_as_well(generator):
    levels = make_levels(
        ("middle", "up_03", "up_09"), strides={"middle": 64, "up_03": 32, "up_09": 8}
    )
    batch, f = make_batch(levels, 1, 2, 2, generator)
    head = FCNHead(levels, 2, width=8).eval()
    assert relative(head(batch), head.forward_dense(f)) < 1e-5


def test_the_first_convolution_reads_the_taps_in_the_order_of_the_paper(generator):
    levels = make_levels(("middle", "up_11"))
    batch, _ = make_batch(levels, 1, 1, 1, generator)
    torch.manual_seed(0)
    head = FCNHead(levels, 2, width=32).eval()
    before = head(batch)
    with torch.no_grad():
        head.project.weight[:, : SHAPES["middle"][0]] = 0
    batch.levels["stride_32"].mul_(100)
    changed = head(batch)
    assert not torch.equal(before, changed)
    batch.levels["stride_32"].mul_(100)
    assert torch.equal(head(batch), changed)  # the first channels are those of "middle"


def test_half_precision_features_are_read(generator):
    levels = make_levels(ALL_TAPS)
    batch, _ = make_batch(levels, 1, 1, 1, generator)
    halves = FeatureBatch(
        levels={name: x.half() for name, x in batch.levels.items()},
        rows=batch.rows,
        columns=batch.columns,
    )
    head = FCNHead(levels, 2, width=8).eval()
    logits = head(halves)
    assert logits.dtype == torch.float32
    assert relative(logits, head(batch)) < 1e-2


def test_bfloat16_autocast_stays_close(generator):
    levels = make_levels(ALL_TAPS)
    batch, _ = make_batch(levels, 1, 2, 2, generator)
    head = FCNHead(levels, 2, width=8).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = head(batch)
    assert relative(rough.float(), head(batch)) < 0.05


@pytest.mark.parametrize("width", [0, 2, 6])
def test_a_width_that_cannot_be_halved_twice_is_refused(width):
    with pytest.raises(ValueError, match="multiple of 4"):
        FCNHead(make_levels(("middle",)), 2, width=width)


def test_a_tap_in_two_levels_is_refused():
    levels = [
        HeadLevel(name="stride_4", stride=4, taps=(("up_11", 2),)),
        HeadLevel(name="stride_8", stride=8, taps=(("up_11", 2),)),
    ]
    with pytest.raises(ValueError, match="two levels"):
        FCNHead(levels, 2, width=4)


def test_a_level_survives_the_way_through_json():
    level = make_levels(ALL_TAPS)[0]
    assert HeadLevel.from_dict(level.to_dict()) == level


def test_the_head_multiplies_the_grid_by_four(generator):
    levels = make_levels(("up_11",))
    batch, f = make_batch(levels, 1, 1, 1, generator)
    logits = FCNHead(levels, 2, width=4).eval()(batch)
    assert logits.shape[-1] == 4 * f.shape[-1] == PATCH_PX
    assert math.isfinite(float(logits.detach().sum()))
