"""What says how good a sample is."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor

from flowdistill.interfaces.condition import Condition

if TYPE_CHECKING:
    from flowdistill.evaluation.features import FeatureExtractor


class Verifier(ABC):
    """Scores images; a search looks for the noises whose samples score highest.

    Concrete verifiers are attrs classes whose fields are their settings.
    """

    def setup(self, features: str | FeatureExtractor | None) -> None:
        """Build what scores need; called once before a search.

        Args:
            features: those of the run's own evaluation, for a verifier that was given none.
        """

    @abstractmethod
    def scores(self, images: Tensor, condition: Condition) -> Tensor:
        """Scores (B,) of images (B, C, H, W) in [-1, 1], the larger the better.

        Samples of a model without a decoder, such as points in the plane, come as they are.
        """

    def fingerprint(self) -> str:
        """A hash of what scores depend on, by default the settings; stored results of a search are known by it."""
        return hashlib.sha256(f"{type(self).__qualname__} {self!r}".encode()).hexdigest()
