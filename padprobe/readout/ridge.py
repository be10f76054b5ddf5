"""A readout in closed form: ridge regression from features to position maps, without a learning rate.

It replaces f_pem of the paper's section 3.1; using ridge regression is ours. There are two ways to the same weights.
:class:`RidgeStatistics` gathers the Gram matrix in one pass over the images, which need not be kept, and :func:`solve`
solves it. Where :func:`gram_gb` says that the matrix is too large, :func:`solve_by_gradients` uses conjugate gradients
on features that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from padprobe.readout.posenet import conv_few, readout_side, upsampling

LAMBDAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Penalties to choose from. A penalty is added to each eigenvalue of the features' correlation matrix. The features are
kept in half precision, with a rounding error of about 1e-7 of a feature's mean square. At a penalty of 1e-6 that error
would decide: two runs that differ only in rounding would give different readouts."""

GRAM_LIMIT_GB = 0.1
"""Above this size (d = 2,500) :func:`solve_by_gradients` is faster: the products cost more than a pass of VGG16."""

CONSTANT_SD = 1e-5
"""A feature counts as constant, and gets weight 0, if its sd is below this fraction of its root mean square."""

TINY = torch.finfo(torch.float64).tiny


def gram_gb(in_channels: int, kernel_size: int) -> float:
    """GB (1e9 bytes) of the Gram matrices of :class:`RidgeStatistics`: 16 d^2 bytes for d = C * k * k features.

    For VGG16 0.035 at kernel 1 and 2.8 at kernel 3. :func:`solve` needs up to three times as much on top, and time that
    grows as d^3. An update takes cells * d^2 multiplications per image.

    Example:
        >>> round(gram_gb(1472, kernel_size=1), 3), round(gram_gb(1472, kernel_size=3), 1)
        (0.035, 2.8)
    """
    return 2 * 8 * (in_channels * kernel_size**2) ** 2 / 1e9


class RidgeStatistics(Metric):
    """Gathers all that ridge regression needs to know about the features, over batches and processes.

    ``update`` takes features (B, C, grid, grid) and ``held_out``, B bools, which mark the images that choose lambda.
    With side = grid - kernel_size + 1 and d = C * kernel_size^2, ``compute`` returns the states, float64. Their index 0
    is for the images to fit, 1 for those held out:

    - ``gram`` (2, d, d): sum of x x' over images and cells;
    - ``sums`` (2, d, side * side): sum of x over images, cell by cell. It serves any target: X't = sums @ t;
    - ``images`` (2,): number of images.

    Each image's Gram matrix is computed by itself, in the features' precision and about the image's means, and added in
    float64. So batch size and order of the images change nothing beyond the rounding of float64.

    Args:
        in_channels: channels of all stages together, C.
        kernel_size: side of the neighbourhood that a cell is read from; odd.
        grid: side of the aligned features in cells.

    Raises:
        ValueError: for an even kernel or one that leaves nothing of the grid; in ``update``, for other shapes.

    Example:
        >>> statistics = RidgeStatistics(in_channels=8, grid=14)
        >>> statistics.update(torch.rand(20, 8, 14, 14), torch.arange(20) % 5 == 4)
        >>> statistics.compute()["images"]
        tensor([16.,  4.], dtype=torch.float64)
    """

    full_state_update = False
    gram: Tensor
    sums: Tensor
    images: Tensor

    def __init__(self, in_channels: int, kernel_size: int = 1, grid: int = 28) -> None:
        super().__init__()
        side = readout_side(kernel_size, grid=grid)
        self.in_channels, self.kernel_size, self.grid = in_channels, kernel_size, grid
        d = in_channels * kernel_size**2
        for name, shape in (("gram", (2, d, d)), ("sums", (2, d, side**2)), ("images", (2,))):
            self.add_state(name, default=torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor, held_out: Tensor | list[bool]) -> None:
        marks = torch.tensor(held_out, dtype=torch.bool) if isinstance(held_out, list) else held_out
        _check(features, marks, self.in_channels, self.grid)
        parts = held_out if isinstance(held_out, list) else held_out.tolist()  # a list is no value to wait for
        with torch.autocast(features.device.type, enabled=False):  # would halve the products' precision
            for i, part in enumerate(map(int, parts)):
                image = features[i : i + 1].to(torch.promote_types(features.dtype, torch.float32))
                x = F.unfold(image, self.kernel_size)[0]  # (d, cells), ordered as (C, k, k)
                mean = x.mean(1, dtype=torch.float64)
                centred = x - mean.to(x.dtype)[:, None]
                self.gram[part] += centred @ centred.T
                self.gram[part].addr_(mean, mean, alpha=x.shape[1])
                self.sums[part] += x
                self.images[part] += 1

    def compute(self) -> dict[str, Tensor]:
        return {"gram": self.gram, "sums": self.sums, "images": self.images}


class RidgeReadout(nn.Module):
    """Predicts position maps by one linear convolution, then bilinear upsampling. No padding, no sigmoid, no clamp.

    :func:`solve` and :func:`solve_by_gradients` make it. Nothing in it is trained.

    Args:
        targets: names of the maps, T of them.
        maps: the maps, (T, H, W).
        weight: (T, C, k, k), for features that are not standardised.
        bias: (T,).
        grid: side of the aligned features in cells.
        lam: the penalty of each target.

    Source: paper, section 3.1, for the readout's place; ridge is ours.

    Example:
        >>> maps = torch.linspace(0, 1, 32).expand(1, 32, 32)
        >>> readout = RidgeReadout(["H"], maps, torch.ones(1, 4, 3, 3), torch.zeros(1), grid=8, lam=[0.1])
        >>> readout(torch.rand(2, 4, 8, 8)).shape
        torch.Size([2, 1, 32, 32])
    """

    depth, padding = 1, 0
    maps: Tensor
    weight: Tensor
    bias: Tensor
    up_h: Tensor
    up_w: Tensor

    def __init__(
        self, targets: Sequence[str], maps: Tensor, weight: Tensor, bias: Tensor, grid: int, lam: Sequence[float]
    ) -> None:
        super().__init__()
        self.targets, self.lam = tuple(targets), tuple(lam)
        self.kernel_size, self.grid, self.size = weight.shape[-1], grid, (maps.shape[-2], maps.shape[-1])
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("maps", maps.to(weight), persistent=False)
        side = readout_side(self.kernel_size, grid=grid)
        for name, pixels in zip(("up_h", "up_w"), self.size, strict=True):
            self.register_buffer(name, upsampling(side, pixels).to(weight), persistent=False)

    def predict_small(self, features: Tensor) -> Tensor:
        """The prediction before upsampling: (B, C, grid, grid) -> (B, T, side, side)."""
        return conv_few(features, self.weight, 0) + self.bias[:, None, None]

    def forward(self, features: Tensor) -> Tensor:
        """Predicted position maps: (B, C, grid, grid) -> (B, T, H, W)."""
        return self.up_h @ self.predict_small(features) @ self.up_w.T


@torch.no_grad()
def solve(
    statistics: RidgeStatistics, targets: Sequence[str], maps: Tensor, lambdas: Sequence[float] = LAMBDAS
) -> RidgeReadout:
    """Solves for the ridge readout of each target. Held-out images choose the penalty; all images give the weights.

    Minimises, over images and cells, mean squared error + lambda |w|^2. Here w are the weights of features with mean 0
    and sd 1 (a constant feature gets 0); the intercept is free. The target of a cell is the mean of the map over it.

    Args:
        statistics: of the images; their sum over all processes is used.
        targets: names of the maps, T of them.
        maps: (T, H, W).
        lambdas: penalties to choose from, each above 0.

    Raises:
        ValueError: without images to fit or held-out images, for features that are not finite, for maps that are not
            one per target, or for bad ``lambdas``.

    Source: paper, section 3.1, for the readout's place; ridge is ours.

    Example:
        >>> maps = torch.linspace(0, 1, 32).expand(1, 32, 32)
        >>> statistics = RidgeStatistics(in_channels=1, grid=8)
        >>> statistics.update(torch.linspace(-1, 1, 8).expand(10, 1, 8, 8), torch.arange(10) % 5 == 4)
        >>> solve(statistics, ["H"], maps).weight.flatten()
        tensor([0.4516])
    """
    state = statistics.compute()
    gram, sums, images = state["gram"], state["sums"], state["images"]
    _check_images(images.tolist(), sums)
    penalties = _penalties(lambdas, gram.device)
    side = readout_side(statistics.kernel_size, grid=statistics.grid)
    target = _cells(targets, maps.to(gram), side).flatten(1)  # (T, cells)
    level = target.mean(1)
    deviation = target - level[:, None]  # sums to 0, so features need no centring against it

    # One eigendecomposition of the correlation matrix serves every target and lambda. The weights are judged on the
    # held-out images, standardised like the images to fit: error = w' XX w - 2 w' Xt (+ t't, the same for all).
    count = images * side**2
    mean, inverse_sd, correlation = _standardised(gram[0], sums[0], count[0])
    cross = deviation @ sums[0].T / count[0] * inverse_sd  # (T, d)
    raw = _ridge(correlation, cross, penalties.expand(len(maps), -1)) * inverse_sd  # (T, L, d)
    outer = sums[1].sum(1) / count[1]
    moment = (gram[1] / count[1]).addr_(outer, outer, alpha=-1).addr_(outer - mean, outer - mean)
    error = (raw @ moment - 2 * (deviation @ sums[1].T / count[1])[:, None]).mul_(raw).sum(2)  # (T, L)
    lam = penalties[error.argmin(1)]
    del moment, correlation

    mean, inverse_sd, correlation = _standardised(gram.sum(0), sums.sum(0), count.sum())
    cross = deviation @ sums.sum(0).T / count.sum() * inverse_sd
    weight = (_ridge(correlation, cross, lam[:, None])[:, 0] * inverse_sd).float()
    bias = (level - weight.double() @ mean).float()
    k = statistics.kernel_size
    weight = weight.reshape(len(maps), statistics.in_channels, k, k)
    return RidgeReadout(targets, maps, weight, bias, statistics.grid, lam.tolist())


@torch.no_grad()
def solve_by_gradients(
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    in_channels: int,
    targets: Sequence[str],
    maps: Tensor,
    kernel_size: int = 3,
    grid: int = 28,
    lambdas: Sequence[float] = LAMBDAS,
    iterations: int = 30,
    device: str | torch.device = "cpu",
) -> RidgeReadout:
    """Solves for ridge readouts by conjugate gradients, for features too many for a Gram matrix.

    The weights are fitted on the images to fit alone; the held-out images only choose lambda. One iteration is one
    sweep over the features, about as long as an epoch of PosENet's training, for all targets and lambdas at once. There
    is one more sweep before and one after. It stops early at a relative residual of 1e-8. Few iterations act like a
    further penalty, so small lambdas may give nearly the same readout. The features are read in float32, never copied.

    Args:
        batches: each call returns a new iterator over (features (B, C, grid, grid), held_out (B,) bool).
        in_channels, kernel_size, grid: as in :class:`RidgeStatistics`.
        targets, maps, lambdas: as in :func:`solve`.
        iterations: the most iterations to take.
        device: where to compute; the batches are moved there.

    Raises:
        ValueError: as :func:`solve` and :class:`RidgeStatistics` do.

    Source: B. Jegerlehner, Krylov space solvers for shifted linear systems, 1996 (hep-lat/9612014).

    Example:
        >>> features, held_out = torch.rand(10, 4, 8, 8), torch.arange(10) % 5 == 4
        >>> maps = torch.linspace(0, 1, 32).expand(1, 32, 32)
        >>> solve_by_gradients(lambda: [(features, held_out)], 4, ["H"], maps, grid=8)(features).shape
        torch.Size([10, 1, 32, 32])
    """
    side, device, k = readout_side(kernel_size, grid=grid), torch.device(device), kernel_size
    penalties = _penalties(lambdas, device)

    def sweep() -> Iterator[tuple[Tensor, Tensor]]:
        for features, held_out in batches():
            _check(features, held_out, in_channels, grid)
            yield features.to(device, torch.float32), held_out.to(device)

    def convolve(features: Tensor, weights: Tensor) -> Tensor:
        return conv_few(features, weights.float().reshape(-1, in_channels, k, k), 0)

    # means, sds and X't of every tap's window follow from sums over images, cell by cell
    sums, squares, images = _sums(
        sweep(), torch.zeros(2, 2, in_channels, grid, grid, dtype=torch.float64, device=device)
    )
    _check_images(images, sums)
    target = _cells(targets, maps.to(sums), side)  # (T, side, side)
    level = target.mean((1, 2))
    count, ones = images[0] * side**2, torch.ones_like(target[None, :1])
    mean = _correlate(sums[:1], ones, k)[0] / count  # (d,)
    inverse_sd = inverse_deviation(mean, _correlate(squares[:1], ones, k)[0] / count)
    cross = _correlate(sums[:1], (target - level[:, None, None])[None], k) / count * inverse_sd  # (T, d)

    def apply(vectors: Tensor) -> Tensor:
        """The correlation matrix of the features times vectors (T, d)."""
        raw = vectors * inverse_sd
        offset = (raw @ mean).float()[:, None, None]
        product, total = torch.zeros_like(raw), torch.zeros_like(level)
        for features, held_out in sweep():
            if not held_out.all():
                prediction = (convolve(features, raw) - offset) * ~held_out[:, None, None, None]
                product += _correlate(features, prediction, k)
                total += prediction.sum((0, 2, 3), dtype=torch.float64)
        return (product - total[:, None] * mean) * inverse_sd / count

    weight = (shifted_gradients(apply, cross, penalties, iterations) * inverse_sd).float()  # (T, L, d)
    bias = (level[:, None] - weight.double() @ mean).float()
    error = torch.zeros_like(bias, dtype=torch.float64)  # squared error on held-out images
    for features, held_out in sweep():
        for i in held_out.nonzero().flatten().tolist():  # one at a time, for a view in place of a copy
            prediction = convolve(features[i : i + 1], weight).reshape(*bias.shape, side, side) + bias[:, :, None, None]
            error += (prediction - target[:, None]).square().sum((2, 3))
    best, each = error.argmin(1), torch.arange(len(maps), device=device)
    chosen = weight[each, best].reshape(-1, in_channels, k, k)
    return RidgeReadout(targets, maps, chosen, bias[each, best], grid, penalties[best].tolist())


def _sums(batches: Iterable[tuple[Tensor, Tensor]], totals: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Adds up x and x^2 over images in ``totals`` (2, 2, C, grid, grid), and counts the images.

    Index 1 of the results is for the images held out, index 0 for the others.
    """
    (sums, squares), images = totals, [0, 0]
    for features, held_out in batches:
        for values, part in zip(features, held_out.int().tolist(), strict=True):
            image = values.double()
            sums[part] += image
            squares[part].addcmul_(image, image)
            images[part] += 1
    return sums, squares, images


def shifted_gradients(apply: Callable[[Tensor], Tensor], right: Tensor, penalties: Tensor, iterations: int) -> Tensor:
    """Solves (A + lambda) x = b for each b of ``right`` (T, d) and each of L ``penalties``: (T, L, d), float64.

    Conjugate gradients run on the system of the smallest penalty. The residuals of the others are multiples (``scale``)
    of its residual. On a GPU it takes all iterations: to ask whether it has converged would be to wait for the device.

    Args:
        apply: multiplies the matrix A by vectors (T, d).
        right: b.
        penalties: each lambda, above 0.
        iterations: the most to take.
    """
    seed = penalties.min()
    shift = penalties - seed  # (L,)
    residual, direction = right.clone(), right.clone()  # (T, d)
    norm = start = right.square().sum(1)  # (T,)
    step_before, beta = torch.ones_like(norm), torch.zeros_like(norm)
    directions = right[:, None].repeat(1, len(shift), 1)  # (T, L, d)
    solution = torch.zeros_like(directions)
    scale = ratio = torch.ones_like(directions[:, :, 0])  # (T, L)
    for _ in range(iterations):
        active = norm > 1e-16 * start  # squared: a relative residual of 1e-8
        if right.device.type == "cpu" and not active.any():
            break
        image = apply(direction) + seed * direction
        step = torch.where(active, norm / (direction * image).sum(1).clamp_min(TINY), 0.0)
        memory = step * beta / step_before.clamp_min(TINY)
        ratio = 1 / (1 + shift * step[:, None] + memory[:, None] * (1 - ratio))  # of scale to the previous scale
        scale = scale * ratio
        solution += (step[:, None] * ratio)[:, :, None] * directions
        residual -= step[:, None] * image
        before, norm = norm, residual.square().sum(1)
        step_before, beta = step, norm / before.clamp_min(TINY)
        direction = residual + beta[:, None] * direction
        directions = scale[:, :, None] * residual[:, None] + (beta[:, None] * ratio**2)[:, :, None] * directions
    return solution


def _correlate(features: Tensor, maps: Tensor, k: int) -> Tensor:
    """Features (B, C, H, W) times maps (B, T, H-k+1, W-k+1) at each of k x k offsets, summed: (T, C*k*k), float64.

    This is the transpose of ``conv_few``: its shifted sums (fold) become shifted copies of the few maps (unfold).
    """
    rows = F.unfold(maps, k, padding=k - 1)  # (B, T*k*k, H*W)
    products = torch.bmm(rows, features.flatten(2).mT).sum(0, dtype=torch.float64)
    return products.reshape(maps.shape[1], k, k, -1).flip(1, 2).permute(0, 3, 1, 2).flatten(1)


def _standardised(gram: Tensor, sums: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (d,), 1 / sd (d,) and correlation matrix (d, d) of features seen ``count`` times."""
    mean = sums.sum(1) / count
    inverse_sd = inverse_deviation(mean, gram.diagonal() / count)
    correlation = (gram / count).addr_(mean, mean, alpha=-1).mul_(inverse_sd).mul_(inverse_sd[:, None])
    return mean, inverse_sd, correlation


def inverse_deviation(mean: Tensor, square: Tensor) -> Tensor:
    """1 / sd from the means of x and of x^2; 0 for a constant."""
    variance = square - mean.square()
    return torch.where(variance > CONSTANT_SD**2 * square, variance.clamp_min(TINY).rsqrt(), 0.0)


def _ridge(correlation: Tensor, cross: Tensor, penalties: Tensor) -> Tensor:
    """Weights (T, L, d) of standardised features, from X't / n (T, d) and ``penalties`` (T, L)."""
    values, vectors = torch.linalg.eigh(correlation)
    shrunk = (cross @ vectors)[:, None] / (values.clamp_min(0) + penalties[:, :, None])
    return shrunk @ vectors.T


def _cells(targets: Sequence[str], maps: Tensor, side: int) -> Tensor:
    """The mean of maps (T, H, W) over each of side x side cells: (T, side, side)."""
    if maps.ndim != 3 or len(maps) != len(targets):
        raise ValueError(f"maps are {tuple(maps.shape)}; expected ({len(targets)}, height, width)")
    return F.adaptive_avg_pool2d(maps, side)


def _penalties(lambdas: Sequence[float], device: torch.device) -> Tensor:
    if not lambdas or not min(lambdas) > 0:
        raise ValueError(f"lambdas are {tuple(lambdas)}; expected one or more numbers above 0, such as {LAMBDAS}")
    return torch.tensor(tuple(lambdas), dtype=torch.float64, device=device)


def _check(features: Tensor, held_out: Tensor, in_channels: int, grid: int) -> None:
    if features.shape[1:] != (in_channels, grid, grid):
        raise ValueError(f"features are {tuple(features.shape)}; expected (images, {in_channels}, {grid}, {grid})")
    if held_out.shape != features.shape[:1] or held_out.dtype != torch.bool:
        raise ValueError(
            f"held_out is {held_out.dtype} {tuple(held_out.shape)}; expected one bool per image, ({len(features)},)"
        )


def _check_images(images: Sequence[float], sums: Tensor) -> None:
    if not min(images):
        raise ValueError(
            f"{images[0]:.0f} images to fit and {images[1]:.0f} held out; both are needed, because held-out images "
            "choose lambda: mark some images in held_out, such as every tenth"
        )
    if not sums.isfinite().all():
        raise ValueError("the features have NaN or infinite values: check the encoder's weights and its input's range")
