"""Networks to compare with: FastMETRO as it was published, and as fast as plain PyTorch runs it."""

from fastmetro.models.baselines.published import PublishedFastMETRO, published_network
from fastmetro.models.baselines.tuned import TunedNetwork, tuned_network

__all__ = ["PublishedFastMETRO", "TunedNetwork", "published_network", "tuned_network"]
