"""What the systems say of themselves that train an image tower alone before everything."""

from __future__ import annotations


class TwoPhases:
    """Properties of a section with `phase`, `causal_lm_weight` and `contrastive_weight`."""

    @property
    def reads_text(self) -> bool:
        """Masked autoencoding by itself is of the image tower alone."""
        return self.phase == "joint"

    @property
    def generates(self) -> bool:
        """Whether it learns to generate text."""
        return self.reads_text and self.causal_lm_weight > 0

    @property
    def contrasts(self) -> bool:
        """Whether images and texts are embedded for comparison."""
        return self.reads_text and self.contrastive_weight > 0
