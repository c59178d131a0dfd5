"""Enlarging and sharpening a picture region by region, so that the enlarged picture never exists as a whole."""

import torch
import torch.nn.functional as F

Box = tuple[int, int, int, int]  # top, bottom, left, right; half-open


def bicubic_matrix(length: int, target: int, start: int, stop: int) -> torch.Tensor:
    """Rows start..stop of the matrix [target, length] that enlarges an axis as F.interpolate(mode="bicubic") does.

    align_corners=False, a = -0.75, border repeated.
    """
    return cubic_matrix((torch.arange(start, stop, dtype=torch.float64) + 0.5) * (length / target) - 0.5, length)


def cubic_matrix(positions: torch.Tensor, length: int, a: float = -0.75) -> torch.Tensor:
    """Weights [positions, length] of cubic convolution at float64 positions of an axis, border repeated; float32."""
    first = positions.floor()
    matrix = torch.zeros(len(positions), length, dtype=torch.float64)
    for tap in range(-1, 3):
        source = first + tap
        weight = keys_kernel((positions - source).abs(), a)
        matrix.scatter_add_(1, source.clamp(0, length - 1).long()[:, None], weight[:, None])
    return matrix.float()


def keys_kernel(x: torch.Tensor, a: float = -0.75) -> torch.Tensor:
    """The cubic convolution kernel of Keys (1981) at distance x in 0..2."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def enlarge(picture: torch.Tensor, size: tuple[int, int], box: Box) -> torch.Tensor:
    """The region `box` of `picture` [..., H, W] enlarged to `size` by bicubic interpolation."""
    top, bottom, left, right = box
    rows, row_span = _banded(picture.shape[-2], size[0], top, bottom)
    cols, col_span = _banded(picture.shape[-1], size[1], left, right)
    part = picture[..., row_span, col_span]
    return rows.to(part) @ part @ cols.to(part).T


def _banded(length: int, target: int, start: int, stop: int) -> tuple[torch.Tensor, slice]:
    """The matrix of `bicubic_matrix` without its empty columns, and which columns are left."""
    matrix = bicubic_matrix(length, target, start, stop)
    used = matrix.any(0).nonzero()
    span = slice(int(used[0]), int(used[-1]) + 1)
    return matrix[:, span], span


def gaussian_taps(sigma: float = 1.0) -> tuple[float, float]:
    """(centre, side) of the normalised 3-tap Gaussian."""
    side = float(torch.exp(torch.tensor(-0.5 / sigma**2, dtype=torch.float64)))
    return 1 / (1 + 2 * side), side / (1 + 2 * side)


def blur3(x: torch.Tensor, sigma: float = 1.0) -> torch.Tensor:
    """3x3 Gaussian blur of the interior of x [..., H + 2, W + 2] -> [..., H, W]."""
    centre, side = gaussian_taps(sigma)
    rows = centre * x[..., 1:-1, :] + side * (x[..., :-2, :] + x[..., 2:, :])
    return centre * rows[..., 1:-1] + side * (rows[..., :-2] + rows[..., 2:])


def enlarge_sharpened(
    picture: torch.Tensor, size: tuple[int, int], box: Box, amount: float = 1.0, sigma: float = 1.0
) -> torch.Tensor:
    """`enlarge`, then an unsharp mask y = (1 + a) x - a blur(x), clamped to the picture's range [-1, 1].

    Borders of the picture are reflected, region borders use the real neighbours.
    """
    if amount == 0:
        return enlarge(picture, size, box).clamp_(-1, 1)
    top, bottom, left, right = box
    inner = (max(top - 1, 0), min(bottom + 1, size[0]), max(left - 1, 0), min(right + 1, size[1]))
    large = enlarge(picture, size, inner)
    missing = (1 - (left - inner[2]), 1 - (inner[3] - right), 1 - (top - inner[0]), 1 - (inner[1] - bottom))
    large = _reflect(large, missing)
    return ((1 + amount) * large[..., 1:-1, 1:-1] - amount * blur3(large, sigma)).clamp_(-1, 1)


def _reflect(x: torch.Tensor, pad: tuple[int, int, int, int]) -> torch.Tensor:
    """F.pad(mode="reflect") for [..., H, W] of any leading shape; axes of one pixel repeat it."""
    if not any(pad):
        return x
    mode = "reflect" if min(x.shape[-2:]) > 1 else "replicate"
    return F.pad(x.reshape(-1, 1, *x.shape[-2:]), pad, mode=mode).reshape(
        *x.shape[:-2], x.shape[-2] + pad[2] + pad[3], x.shape[-1] + pad[0] + pad[1]
    )


def resize(picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A whole picture [B, C, H, W] to `size`: bicubic; antialiased along the way down."""
    if tuple(picture.shape[-2:]) == tuple(size):
        return picture
    return F.interpolate(picture, size=size, mode="bicubic", align_corners=False, antialias=True)
