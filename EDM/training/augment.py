"""The augmentation pipe of EDM: 13 image transformations, each applied to an image with a small probability.

The network is told which, so generated images stay free of them (Karras et al., arXiv 2206.00364, appendix F.2;
geometry and colour after StyleGAN2-ADA, arXiv 2006.06676). `draw` makes the parameters of a batch, `apply` transforms
the images. Nothing waits for the device.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from shared.training.precision import constants, to_device

# Low-pass filter of the sym6 wavelet (Daubechies, "Ten Lectures on Wavelets"), 12 taps.
SYM6 = (0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
        0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
        0.0017677118642428036, -0.007800708325034148)
MARGIN = 6  # half the taps: what the filters need beyond the image

# Per augmentation: the raw numbers per image, in drawing order. A "gate" decides whether it is applied; a uniform
# number is in [0, 1), an integer is one below the given one.
DRAWS: dict[str, tuple[str | int, ...]] = {
    "xflip": (2, "gate"), "yflip": (2, "gate"), "rotate_int": (4, "gate"),
    "translate_int": ("uniform", "uniform", "gate"), "scale": ("normal", "gate"), "rotate_frac": ("uniform", "gate"),
    "aniso": ("normal", "uniform", "gate", "gate"), "translate_frac": ("normal", "normal", "gate"),
    "brightness": ("normal", "gate"), "contrast": ("normal", "gate"), "lumaflip": (2, "gate"),
    "hue": ("uniform", "gate"), "saturation": ("normal", "gate"),
}
GEOMETRY = ("scale", "rotate_frac", "aniso", "translate_frac")
COLOUR = ("brightness", "contrast", "lumaflip", "hue", "saturation")
# The parameters of an image: the numbers drawn, scaled to their range; 0 if the augmentation is not applied.
COLUMNS = ("xflip", "yflip", "rotate_int", "translate_int_x", "translate_int_y", "scale", "rotate_frac", "aniso",
           "aniso_direction", "translate_frac_x", "translate_frac_y", "brightness", "contrast", "lumaflip", "hue",
           "saturation")


class AugmentPipe:
    """The augmentations whose multiplier is not 0, each applied with probability multiplier·p.

    The other arguments are their strengths: shifts in image sizes, scales in powers of 2, angles in half turns.
    `label_dim` is the number of columns that describe them to the network.
    """

    def __init__(self, p: float = 1, xflip: float = 0, yflip: float = 0, rotate_int: float = 0,
                 translate_int: float = 0, translate_int_max: float = 0.125, scale: float = 0, rotate_frac: float = 0,
                 aniso: float = 0, translate_frac: float = 0, scale_std: float = 0.2, rotate_frac_max: float = 1,
                 aniso_std: float = 0.2, aniso_rotate_prob: float = 0.5, translate_frac_std: float = 0.125,
                 brightness: float = 0, contrast: float = 0, lumaflip: float = 0, hue: float = 0,
                 saturation: float = 0, brightness_std: float = 0.2, contrast_std: float = 0.5, hue_max: float = 1,
                 saturation_std: float = 1) -> None:
        self.p = p
        multipliers = dict(xflip=xflip, yflip=yflip, rotate_int=rotate_int, translate_int=translate_int, scale=scale,
                           rotate_frac=rotate_frac, aniso=aniso, translate_frac=translate_frac, brightness=brightness,
                           contrast=contrast, lumaflip=lumaflip, hue=hue, saturation=saturation)
        self.multipliers = {name: multiplier for name, multiplier in multipliers.items() if multiplier > 0}
        self.translate_int_max, self.scale_std, self.rotate_frac_max = translate_int_max, scale_std, rotate_frac_max
        self.aniso_std, self.aniso_rotate_prob = aniso_std, aniso_rotate_prob
        self.translate_frac_std = translate_frac_std
        self.brightness_std, self.contrast_std, self.saturation_std = brightness_std, contrast_std, saturation_std
        self.hue_max = hue_max
        self.label_dim = len(self._labels({name: torch.zeros(1) for name in COLUMNS}, 1, 1))

    def compile(self) -> None:
        """Compile everything but the draws."""
        for name in ("parameters", "margins", "apply"):
            setattr(self, name, torch.compile(getattr(self, name), dynamic=False))

    # ------------------------------------------------------------------------------------------------------- numbers

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Return the parameters [count, 16] of `count` images, float32 on the generator's device."""
        options = dict(generator=generator, device=generator.device)
        if not self.multipliers:
            return torch.zeros([count, len(COLUMNS)], device=generator.device)
        numbers = []
        for name in self.multipliers:
            for kind in DRAWS[name]:
                if isinstance(kind, int):
                    numbers.append(torch.randint(kind, [count], **options).to(torch.float32))
                else:
                    numbers.append((torch.randn if kind == "normal" else torch.rand)([count], **options))
        return self.parameters(numbers)

    def parameters(self, numbers: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the parameters [N, 16] of the raw numbers that DRAWS lists for the augmentations in use, [N] each."""
        columns = dict.fromkeys(COLUMNS, torch.zeros_like(numbers[0], dtype=torch.float32))
        rest = iter(numbers)
        for name, multiplier in self.multipliers.items():
            values = [(kind, next(rest)) for kind in DRAWS[name]]
            gates = [number for kind, number in values if kind == "gate"]
            thresholds = (multiplier * self.p, self.aniso_rotate_prob)  # the second gate is that of the direction
            values = [self._in_range(name, kind, number) for kind, number in values if kind != "gate"]
            targets = [column for column in COLUMNS if column == name or column.startswith(f"{name}_")]
            for index, (target, value) in enumerate(zip(targets, values, strict=True)):
                which = min(index, len(gates) - 1)
                columns[target] = torch.where(gates[which] < thresholds[which], value, 0)
        return torch.stack(list(columns.values()), dim=1)

    def _in_range(self, name: str, kind: str | int, number: torch.Tensor) -> torch.Tensor:
        if kind != "uniform":
            return number
        strength = {"rotate_frac": self.rotate_frac_max * math.pi, "hue": self.hue_max * math.pi, "aniso": math.pi}
        return (2 * number - 1) * strength.get(name, 1)

    # -------------------------------------------------------------------------------------------------------- images

    def margins(self, parameters: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Return `margins` of a batch with these parameters [N, 16], from `draw`."""
        values = dict(zip(COLUMNS, parameters.unbind(1), strict=True))
        return margins(self._geometry(values, height, width), height, width)

    def apply(self, images: torch.Tensor, parameters: torch.Tensor, margins: torch.Tensor | None = None
              ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the transformed images and the labels [N, label_dim] that describe the transformations.

        images [N, C, H, W] in any range (H = W with rotate_int, C = 1 or 3 with colours); parameters from `draw`;
        margins of the batch that the images belong to (None: they are all of it).
        Raises ValueError for images that a transformation is not defined for.
        """
        height, width = images.shape[2:]
        used = set(self.multipliers)
        values = dict(zip(COLUMNS, parameters.to(images.device).unbind(1), strict=True))
        if "rotate_int" in used and height != width:
            raise ValueError(f"rotate_int needs square images, got {height} x {width}")
        if used.intersection(COLOUR) and images.shape[1] not in (1, 3):
            raise ValueError(f"colour augmentations need images of 1 or 3 channels, got {images.shape[1]}")

        quarter = values["rotate_int"]
        for column, axis in (("xflip", 3), ("yflip", 2)):
            if column in used:
                images = torch.where(_per_image(values[column]) == 1, images.flip(axis), images)
        if "rotate_int" in used:
            images = torch.where(_per_image((quarter == 1) | (quarter == 2)), images.flip(3), images)
            images = torch.where(_per_image((quarter == 2) | (quarter == 3)), images.flip(2), images)
            images = torch.where(_per_image((quarter == 1) | (quarter == 3)), images.transpose(2, 3), images)
        if "translate_int" in used:
            images = shift(images, *self._whole_pixels(values, height, width))
        if used.intersection(GEOMETRY):
            images = warp(images, self._geometry(values, height, width), margins)
        if used.intersection(COLOUR):
            images = recolour(images, self._colour(values))
        labels = self._labels(values, height, width)
        return images, torch.stack(labels, dim=1) if labels else images.new_zeros([len(images), 0])

    def _whole_pixels(self, values: dict[str, torch.Tensor], height: int, width: int
                      ) -> tuple[torch.Tensor, torch.Tensor]:
        return ((values["translate_int_x"] * width * self.translate_int_max).round(),
                (values["translate_int_y"] * height * self.translate_int_max).round())

    def _geometry(self, v: dict[str, torch.Tensor], height: int, width: int) -> torch.Tensor:
        """Return [N, 3, 3]: where in the image (pixels from its centre) each output position is taken from."""
        grow = (v["scale"] * self.scale_std).exp2()
        stretch = (v["aniso"] * self.aniso_std).exp2()
        direction = v["aniso_direction"]
        return (scaling(1 / grow, 1 / grow) @ rotation(v["rotate_frac"])
                @ rotation(-direction) @ scaling(1 / stretch, stretch) @ rotation(direction)
                @ translation(-v["translate_frac_x"] * width * self.translate_frac_std,
                              -v["translate_frac_y"] * height * self.translate_frac_std))

    def _colour(self, v: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return [N, 4, 4]: the affine map of (r, g, b, 1)."""
        offset = v["brightness"] * self.brightness_std
        identity, along, turn, last = _colour_axes(offset.device)
        across = identity - along

        def each(value: torch.Tensor) -> torch.Tensor:
            return value[:, None, None]

        brightness = identity + each(offset) * torch.outer(1 - last, last)
        contrast = each((v["contrast"] * self.contrast_std).exp2()) * (identity - torch.outer(last, last))
        contrast = contrast + torch.outer(last, last)
        lumaflip = identity - 2 * each(v["lumaflip"]) * along
        in_plane = across - torch.outer(last, last)
        hue = along + torch.outer(last, last) + each(v["hue"].cos()) * in_plane + each(v["hue"].sin()) * turn
        saturation = along + torch.outer(last, last) + each((v["saturation"] * self.saturation_std).exp2()) * in_plane
        return saturation @ hue @ lumaflip @ contrast @ brightness

    def _labels(self, v: dict[str, torch.Tensor], height: int, width: int) -> list[torch.Tensor]:
        quarter = v["rotate_int"]
        tx, ty = self._whole_pixels(v, height, width)
        reach = max(self.translate_int_max, 1e-30)  # a reach of 0 pixels: all shifts are 0
        labels = {
            "rotate_int": [((quarter == 1) | (quarter == 2)).float(), ((quarter == 2) | (quarter == 3)).float()],
            "translate_int": [tx / (width * reach), ty / (height * reach)],
            "rotate_frac": [v["rotate_frac"].cos() - 1, v["rotate_frac"].sin()],
            "aniso": [v["aniso"] * v["aniso_direction"].cos(), v["aniso"] * v["aniso_direction"].sin()],
            "translate_frac": [v["translate_frac_x"], v["translate_frac_y"]],
            "hue": [v["hue"].cos() - 1, v["hue"].sin()],
        }
        return [label for name in self.multipliers for label in labels.get(name) or [v[name]]]


# ----------------------------------------------------------------------------------------------------------- operations

def shift(images: torch.Tensor, tx: torch.Tensor, ty: torch.Tensor) -> torch.Tensor:
    """Move each image [N, C, H, W] right by tx and up by ty whole pixels ([N] floats); edges are mirrored."""
    count, channels, height, width = images.shape
    columns = _mirror(torch.arange(width, device=images.device) - tx.long()[:, None], width)
    rows = _mirror(torch.arange(height, device=images.device) + ty.long()[:, None], height)
    index = (rows[:, :, None] * width + columns[:, None, :]).reshape(count, 1, -1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, index).unflatten(2, (height, width))


def margins(geometry: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return [2, 2], rows (left, top) and (right, bottom): by how many mirrored pixels images are continued.

    That is as far as the corners of any image of the batch reach under its `geometry` [N, 3, 3], and the filter beyond
    them; at most once the image. So an image's border depends on its batch, as published.
    """
    corners, beyond, most = _corners(height, width, geometry.device)
    places = geometry[:, :2] @ corners
    reach = torch.stack([-places, places]).amax(dim=(1, 3))
    return (reach + beyond).clamp(min=0).minimum(most).ceil()


def warp(images: torch.Tensor, geometry: torch.Tensor, batch_margins: torch.Tensor | None = None) -> torch.Tensor:
    """Transform each image [N, C, H, W] by its `geometry` [N, 3, 3] without aliasing.

    Images are continued by mirroring as far as `batch_margins` (None: `margins` of these images), doubled in size by
    the wavelet filter, sampled bilinearly and halved in size by the same filter. The filters are linear maps of rows
    and of columns: one matrix each.
    """
    height, width = images.shape[2:]
    if batch_margins is None:
        batch_margins = margins(geometry, height, width)
    up_columns, up_rows = _doubling(width, batch_margins[:, 0]), _doubling(height, batch_margins[:, 1])
    down_rows, down_columns = (_halving(size, images.device) for size in (height, width))
    doubled = up_rows @ images.float() @ up_columns.T
    # From pixels of the image to pixels of the doubled one, whose grid is shifted by half a pixel; then to [-1, 1].
    out_height, out_width = 2 * (height + MARGIN), 2 * (width + MARGIN)
    finer, coarser, centred, inwards, outwards = _grid_maps(*doubled.shape[2:], out_height, out_width, images.device)
    geometry = inwards @ (finer @ geometry @ coarser @ centred) @ outwards
    grid = F.affine_grid(geometry[:, :2], [len(images), 1, out_height, out_width], align_corners=False)
    sampled = F.grid_sample(doubled, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return down_rows @ sampled @ down_columns.T


def recolour(images: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """Map the colours of each image [N, 3 or 1, H, W] by `colour` [N, 4, 4]; gray takes the mean of the three rows."""
    count, channels = images.shape[:2]
    matrix = colour[:, :3]
    if channels == 1:
        row = matrix.mean(dim=1, keepdim=True)
        matrix = torch.cat([row[:, :, :3].sum(dim=2, keepdim=True), row[:, :, 3:]], dim=2)
    return (matrix[:, :, :-1] @ images.flatten(2) + matrix[:, :, -1:]).view_as(images)


def translation(tx: torch.Tensor, ty: torch.Tensor) -> torch.Tensor:
    """Return the homogeneous matrices [..., 3, 3] of shifts."""
    one, zero = torch.ones_like(tx), torch.zeros_like(tx)
    return _matrix([[one, zero, tx], [zero, one, ty], [zero, zero, one]])


def scaling(sx: torch.Tensor, sy: torch.Tensor) -> torch.Tensor:
    """Return the homogeneous matrices [..., 3, 3] of scalings."""
    one, zero = torch.ones_like(sx), torch.zeros_like(sx)
    return _matrix([[sx, zero, zero], [zero, sy, zero], [zero, zero, one]])


def rotation(angle: torch.Tensor) -> torch.Tensor:
    """Return the homogeneous matrices [..., 3, 3] of rotations by angles in radians."""
    cos, sin, one, zero = angle.cos(), angle.sin(), torch.ones_like(angle), torch.zeros_like(angle)
    return _matrix([[cos, -sin, zero], [sin, cos, zero], [zero, zero, one]])


def _matrix(rows: list[list[torch.Tensor]]) -> torch.Tensor:
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def _per_image(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]


def _mirror(index: torch.Tensor, size: int) -> torch.Tensor:
    """Return the positions inside 0..size-1 of others, with the image mirrored at its outermost pixels."""

    period = max(2 * size - 2, 1)
    return (size - 1) - ((size - 1) - index.remainder(period)).abs()


@constants
def _colour_axes(device: torch.device) -> list[torch.Tensor]:
    """Return the matrices of colour rotations: the identity [4, 4]; the projection [4, 4] on the gray axis, the axis of
    hues; the cross product [4, 4] with it; the vector [4] of the constant."""
    gray = torch.tensor([1.0, 1.0, 1.0, 0.0]) / math.sqrt(3)
    turn = torch.tensor([[0.0, -1, 1, 0], [1, 0, -1, 0], [-1, 1, 0, 0], [0, 0, 0, 0]]) / math.sqrt(3)
    axes = torch.eye(4), torch.outer(gray, gray), turn, torch.tensor([0.0, 0.0, 0.0, 1.0])
    return [to_device(axis, device) for axis in axes]


@constants
def _grid_maps(doubled_height: int, doubled_width: int, height: int, width: int, device: torch.device
               ) -> list[torch.Tensor]:
    """Return the matrices [3, 3] around a geometry in `warp`: from pixels to those of the doubled image, and back in
    two steps; from these to [-1, 1] of the doubled image, and from [-1, 1] of the output [height, width]."""
    half, two = torch.tensor(0.5), torch.tensor(2.0)
    maps = (translation(-half, -half) @ scaling(two, two), scaling(half, half), translation(half, half),
            scaling(torch.tensor(2 / doubled_width), torch.tensor(2 / doubled_height)),
            scaling(torch.tensor(width / 2), torch.tensor(height / 2)))
    return [to_device(each, device) for each in maps]


@constants
def _corners(height: int, width: int, device: torch.device) -> list[torch.Tensor]:
    """Return, in pixels from an image's centre: its corners [3, 4], how far the filter and how far a mirror image
    reach beyond them ([2] each, in x and y)."""
    x, y = (width - 1) / 2, (height - 1) / 2
    corners = torch.tensor([[-x, x, x, -x], [-y, -y, y, y], [1, 1, 1, 1]])
    beyond, most = torch.tensor([MARGIN - x, MARGIN - y]), torch.tensor([width - 1.0, height - 1])
    return [to_device(each, device) for each in (corners, beyond, most)]


def _doubling(size: int, margin: torch.Tensor) -> torch.Tensor:
    """Return [2(3·size - 2), size]: continue a line by mirroring and double its length; 0 beyond `margin` [2]."""
    place, mirrored, doubled = _whole_doubling(size, margin.device)
    before, after = margin
    kept = (place >= -before) & (place < size + after)
    return torch.where(kept.repeat_interleave(2)[:, None] & kept, doubled, 0) @ mirrored


@constants
def _whole_doubling(size: int, device: torch.device) -> list[torch.Tensor]:
    """Return the places [L] of a line's pixels continued by size - 1 on each side, L = 3·size - 2; the matrix [L, size]
    that continues it by mirroring; the matrix [2L, L] that doubles its length."""
    place = torch.arange(-(size - 1), 2 * size - 1)
    pixels = torch.eye(len(place), dtype=torch.float64)[:, None]  # what becomes of each single pixel
    spaced = pixels.new_zeros(len(place), 1, 2 * len(place) - 1)
    spaced[:, :, ::2] = pixels
    taps = torch.tensor(SYM6, dtype=torch.float64).flip(0)[None, None]
    doubled = F.conv1d(spaced, taps, padding=MARGIN)[:, 0].T
    return [to_device(each, device) for each in (place, F.one_hot(_mirror(place, size), size).float(), doubled.float())]


@constants
def _halving(size: int, device: torch.device) -> torch.Tensor:
    """Return [size, 2(size + MARGIN)]: halve a line's length and cut off half the margin on each side."""
    pixels = torch.eye(2 * (size + MARGIN), dtype=torch.float64)[:, None]
    taps = torch.tensor(SYM6, dtype=torch.float64)[None, None]
    halved = F.conv1d(pixels, taps, stride=2, padding=MARGIN - 1)[:, 0]
    cut = MARGIN // 2
    return halved[:, cut:-cut].T.float().to(device)
