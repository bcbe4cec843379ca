"""What is hidden to be found again: tokens for masked language modelling, and the noise that orders masks of patches.

Both are a pure function of the integers that name a document (seed, epoch, dataset, document), so that the layout, the
number of workers and a resumed run change nothing; how many tokens are hidden follows from the document's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_mm.data.reading.order import keyed_generator

#: Of the hidden tokens, the shares that show the mask token and a random one; the rest show themselves (BERT,
#: arXiv:1810.04805).
SHOW_MASK, SHOW_RANDOM = 0.8, 0.1


@dataclass(frozen=True)
class Masking:
    """How the tokens of a document are hidden.

    Attributes:
        ratio: share of the maskable tokens.
        mask_id: the mask token.
        maskable: whether each id is an ordinary token, bool [ids]: only these are hidden, and replacements are drawn
            from them.
    """

    ratio: float
    mask_id: int
    maskable: np.ndarray
    _ordinary: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ordinary", np.flatnonzero(self.maskable))

    def __call__(self, tokens: np.ndarray, key: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Hides round(ratio · n) of a document's n maskable tokens, at least one where there is any.

        Args:
            tokens: int [length].
            key: integers that name the document.

        Returns:
            The tokens shown, int64 [length], and which are to be found again, bool [length].
        """
        shown, hidden = tokens.astype(np.int64), np.zeros(tokens.size, bool)
        places = np.flatnonzero(self.maskable[tokens])
        if not places.size:
            return shown, hidden
        count = max(1, int(self.ratio * places.size + 0.5))
        generator = keyed_generator(key)
        chosen = places[np.argsort(generator.random(places.size))[:count]]
        hidden[chosen] = True
        fate = generator.random(count)
        shown[chosen[fate < SHOW_MASK]] = self.mask_id
        swapped = chosen[(fate >= SHOW_MASK) & (fate < SHOW_MASK + SHOW_RANDOM)]
        shown[swapped] = self._ordinary[generator.integers(0, self._ordinary.size, swapped.size)]
        return shown, hidden


def patch_noise(patches: int, key: Sequence[int]) -> np.ndarray:
    """Noise of each patch of one image, uniform in [0, 1), float32 [patches]; the key names the image."""
    return keyed_generator(key).random(patches, dtype=np.float32)
