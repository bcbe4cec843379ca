"""Windows of Swin transformers (arXiv:2103.14030) over images and clips: who is whose neighbour, as index tensors.

A grid of tokens (time, height, width) is shifted cyclically, padded at its end to whole windows, and cut into them.
Windows that wrapped around the grid's end hold tokens that are no neighbours, so they come in kinds: by the dimensions
in which they wrapped. All windows of a kind share one mask. Tokens are brought into window order kind by kind (of each
kind clip by clip, window by window), so that a kind is a contiguous slice with a small mask, and no mask of all windows
exists. Images are clips of one frame; they and the clips of a microbatch are two groups in one order.

Everything here is made from sizes alone. Shape suffixes: S tokens, W places of tokens in all windows of the microbatch
(more than S where there is padding), M tokens of a window, P distinct offsets between two tokens of a window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch.nn import functional

Size = tuple[int, int, int]
"""Time, height, width."""

#: Inner width of the MLP that makes a bias of an offset.
POSITION_WIDTH = 512


@dataclass(frozen=True)
class WindowGrid:
    """A grid of tokens, the window that it is cut into, and the cyclic shift before that."""

    size: Size
    window: Size
    shift: Size

    @classmethod
    def of(cls, size: Size, window: Size, shifted: bool) -> WindowGrid:
        """Windows never exceed the grid, and a dimension that one window covers is not shifted."""
        within = tuple(min(w, n) for w, n in zip(window, size))
        shift = tuple(w // 2 if shifted and n > w else 0 for w, n in zip(window, size))
        return cls(size, within, shift)

    @property
    def counts(self) -> Size:
        """Windows along each dimension."""
        return tuple(-(-n // w) for n, w in zip(self.size, self.window))

    @property
    def num_tokens(self) -> int:
        """S of one clip."""
        return math.prod(self.size)

    @property
    def length(self) -> int:
        """M."""
        return math.prod(self.window)

    @property
    def num_places(self) -> int:
        """W of one clip."""
        return math.prod(self.counts) * self.length

    @property
    def num_offsets(self) -> int:
        """P."""
        return math.prod(2 * w - 1 for w in self.window)

    def kinds(self) -> Iterator[tuple[tuple[slice, ...], tuple[bool, ...]]]:
        """For each kind, its windows along each dimension and the dimensions in which they wrapped."""
        choices = []
        for count, shift in zip(self.counts, self.shift):
            choices.append([(slice(0, count - 1), False), (slice(count - 1, count), True)] if shift else
                           [(slice(0, count), False)])  # fmt: skip
        for chosen in product(*choices):
            yield tuple(part for part, _ in chosen), tuple(wrapped for _, wrapped in chosen)

    def order(self, clips: int, first: int, device: torch.device) -> torch.Tensor:
        """[clips · places]: the token at each place, -1 for padding; tokens of the clips count from `first`."""
        tokens = torch.arange(first, first + clips * self.num_tokens, device=device).view(clips, *self.size)
        if self.num_places != self.num_tokens:
            missing = [n * w - size for n, w, size in zip(self.counts, self.window, self.size)]
            tokens = functional.pad(tokens, [end for size in reversed(missing) for end in (0, size)], value=-1)
        if any(self.shift):
            tokens = tokens.roll([-s for s in self.shift], dims=(1, 2, 3))
        cut = [extent for pair in zip(self.counts, self.window) for extent in pair]
        windows = tokens.view(clips, *cut).permute(0, 1, 3, 5, 2, 4, 6)
        return torch.cat([windows[(slice(None), *part)].flatten() for part, _ in self.kinds()])

    def mask(self, wrapped: tuple[bool, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        """Added to the scores of a kind, [M, M]: -inf between the two sides of a dimension that wrapped."""
        if not any(wrapped):
            return None
        sides = []
        for across, window, shift in zip(wrapped, self.window, self.shift):
            position = torch.arange(window, device=device)
            sides.append((position >= window - shift) if across else torch.zeros_like(position, dtype=torch.bool))
        sides_M3 = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).flatten(0, 2)
        apart = (sides_M3[:, None] != sides_M3[None]).any(dim=-1)
        return torch.zeros(apart.shape, dtype=dtype, device=device).masked_fill(apart, float("-inf"))

    def coordinates(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Log-spaced offsets between tokens of a window, [P, 3] (Swin V2, arXiv:2111.09883, section 3.3).

        sign(x) · log₂(1 + |x|) / log₂ 8, where x is the offset over the largest one, times 8; 0 along a single token.
        """
        axes = []
        for window in self.window:
            offset = torch.arange(1 - window, window, dtype=torch.float32, device=device)
            scaled = offset * (8.0 / max(1, window - 1))
            axes.append(scaled.sign() * (scaled.abs() + 1.0).log2() / 3.0)
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2).to(dtype)

    def pairs(self, device: torch.device) -> torch.Tensor:
        """Row of `coordinates` of every pair of tokens, query first, [M, M]."""
        index = torch.zeros((), dtype=torch.int64, device=device)
        for dim, window in enumerate(self.window):
            position = torch.arange(window, device=device)
            offset = position[:, None] - position[None] + window - 1
            shape = [1] * 6
            shape[dim] = shape[dim + 3] = window
            index = index * (2 * window - 1) + offset.view(shape)
        return index.reshape(self.length, self.length)


@dataclass(frozen=True)
class WindowGroup:
    """The images or the clips of a microbatch in window order.

    Attributes:
        num_places: rows of the group in window order.
        length: M.
        coordinates: [P, 3].
        pairs: [M, M], rows of `coordinates`.
        kinds: for each kind the number of windows and the mask [M, M], None where all of a window is seen.
    """

    num_places: int
    length: int
    coordinates: torch.Tensor
    pairs: torch.Tensor
    kinds: tuple[tuple[int, torch.Tensor | None], ...]


@dataclass(frozen=True)
class Windows:
    """Window order of all tokens of a microbatch.

    Attributes:
        order: [W], the token at each place, -1 for padding.
        places: [S], the place of each token.
    """

    order: torch.Tensor
    places: torch.Tensor
    groups: tuple[WindowGroup, ...]

    @classmethod
    def of(cls, grids: list[tuple[WindowGrid, int]], dtype: torch.dtype, device: torch.device) -> Windows:
        """Windows of (grid, number of clips) after one another, as their tokens are; `dtype` is that of the scores."""
        orders, groups, first = [], [], 0
        for grid, clips in grids:
            orders.append(grid.order(clips, first, device))
            first += clips * grid.num_tokens
            kinds = []
            for part, wrapped in grid.kinds():
                windows = math.prod(len(range(count)[along]) for count, along in zip(grid.counts, part))
                kinds.append((clips * windows, grid.mask(wrapped, dtype, device)))
            coordinates, pairs = grid.coordinates(dtype, device), grid.pairs(device)
            groups.append(WindowGroup(clips * grid.num_places, grid.length, coordinates, pairs, tuple(kinds)))
        order = torch.cat(orders)
        places = order.new_zeros(first + 1)  # the last one collects padding
        places.scatter_(0, torch.where(order < 0, first, order), torch.arange(len(order), device=device))
        return cls(order, places[:first], tuple(groups))

    def cut(self, tokens: torch.Tensor) -> torch.Tensor:
        """[S, C] -> [W, C] in window order, zero on padding."""
        return _Rearrange.apply(tokens, self.order, self.places)

    def join(self, placed: torch.Tensor) -> torch.Tensor:
        """[W, C] -> [S, C]."""
        return _Rearrange.apply(placed, self.places, self.order)


class _Rearrange(torch.autograd.Function):
    """Rows by index; the backward pass picks rows by the inverse, where autograd would add them one by one."""

    @staticmethod
    def forward(ctx, rows, index, inverse):
        ctx.save_for_backward(index, inverse)
        return _pick(rows, index)

    @staticmethod
    def backward(ctx, gradient):
        _, inverse = ctx.saved_tensors
        return _pick(gradient, inverse), None, None


def _pick(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    if len(index) <= len(rows):
        return rows.index_select(0, index)
    return rows.index_select(0, index.clamp(min=0)) * (index >= 0).to(rows.dtype)[:, None]
