"""What a network does to the sizes of its maps, found without running it on data."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from torch import nn

from padprobe.maps import Size, size_pair
from padprobe.network.cells import Alignment, Cells
from padprobe.network.forward import Trace, trace_forward, trace_once
from padprobe.network.layout import find_layouts, map_size
from padprobe.network.padding import as_built, has_shortcuts


def stage_shapes(
    encoder: nn.Module, stages: Sequence[str], image_size: Size = 224, layout: str = "auto"
) -> list[tuple[int, int, int]]:
    """(channels, height, width) of each named stage's maps for one image, whatever the layout of the layer's output.

    No layer is run, except where a layout is checked, see :func:`~padprobe.network.layout.find_layouts`.

    Raises:
        ValueError: as :func:`~padprobe.network.layout.find_layouts`; and for an image that is too small (with the
            smallest size that works).

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2))
        >>> stage_shapes(network, ["0", "1"], image_size=(32, 48))
        [(8, 32, 48), (8, 16, 24)]
    """
    layouts = find_layouts(encoder, stages, image_size, layout)
    return [(layouts[stage].channels, layouts[stage].height, layouts[stage].width) for stage in stages]


def context_size(
    encoder: nn.Module, image_size: Size, stages: Sequence[str] | None = None
) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """The larger image on which an unpadded encoder replaces padding by real surroundings.

    The unpadded encoder's outputs for the larger image, cropped around the centre, have the size and the geometry of
    the padded encoder's outputs for the central ``image_size`` pixels: same resolution, no padding. ``stages`` are the
    layers whose outputs will be cropped; default: the (B, C, H, W) maps that the encoder returns.

    Returns:
        (height, width) of the larger image, and of each cropped output. VGG16 at 224: 404, and 224, 112, 56, 28, 14,
        along both. Every crop is central, in whole cells, and its cells are those of the padded maps.

    Raises:
        ValueError: if no size fits whose sides are up to eight times those of ``image_size``.
    """

    def maps(trace: Trace) -> list[tuple[tuple[int, int], Cells | None]]:
        if stages is None:
            return list(zip(trace.sides, trace.cells, strict=True))
        by_layer = {call.layer: (map_size(call, trace.size) or (0, 0), call.cells) for call in trace.calls}
        return [by_layer[stage] for stage in stages]

    size, met = size_pair(image_size), has_shortcuts(encoder)
    with as_built(encoder), Alignment() if met else nullcontext():
        padded = trace_forward(encoder, size)
    wanted = [sides for sides, _ in maps(padded)]
    step = max((axis.step for _, cells in maps(padded) for axis in cells or ()), default=1)
    larger_sides: dict[int, int] = {}
    for extra in range(0, 7 * max(size), 2 * max(step, 1)):
        larger = (size[0] + extra, size[1] + extra)
        with as_built(encoder, "valid"):
            try:
                trace = trace_once(encoder, larger)
            except Exception:  # what a network raises for an image that it cannot take
                continue
        for i in (0, 1):
            if met:
                fits = all(
                    _crops_to(side[i], want[i], cells, i, extra // 2)
                    for (side, cells), want in zip(maps(trace), wanted, strict=True)
                )
            else:
                surplus = [side[i] - want[i] for (side, _), want in zip(maps(trace), wanted, strict=True)]
                fits = trace.exact[i] and padded.exact[i] and all(n >= 0 and n % 2 == 0 for n in surplus)
            if fits:
                larger_sides.setdefault(i, larger[i])
        if len(larger_sides) == 2:
            return (larger_sides[0], larger_sides[1]), wanted
    raise ValueError(
        f"no image size up to {' x '.join(str(8 * n) for n in size)} px gives {type(encoder).__name__} without padding "
        f"the maps that it has with padding at {' x '.join(map(str, size))} px, cropped around the centre: its "
        "receptive field may be larger than that. Try another image_size (a multiple of 32 fits most networks), probe "
        "fewer of the deep stages, or leave context out"
    )


def _crops_to(side: int, wanted: int, cells: Cells | None, axis: int, margin: int) -> bool:
    """Whether the central cells of an unpadded map are those of the padded map of the image without its margin."""
    if cells is None or cells[axis].step == 0 or margin % cells[axis].step:
        return side == wanted and margin == 0
    return side >= wanted and (side - wanted) // 2 == margin // cells[axis].step - cells[axis].first


def output_sides(encoder: nn.Module, image_size: Size) -> list[tuple[int, int]]:
    """(height, width), in cells, of the (B, C, H, W) maps that an encoder returns for an image. No layer is run."""
    return trace_forward(encoder, image_size).sides
