"""Checks of features before they are compared."""

from jaxtyping import Float
from torch import Tensor

from ganscale.errors import UserError


def check_features(features: Float[Tensor, "count dim"], least: int, purpose: str) -> None:
    """Raises UserError for fewer than `least` samples, and for NaN or infinite features."""
    if len(features) < least:
        raise UserError(f"{purpose} needs {least:,} samples or more, not {len(features):,}")
    # Both are NaN if any feature is. `isfinite` of all features would take a mask of their size.
    if not all(bound.isfinite() for bound in features.aminmax()):
        raise UserError(f"{purpose}: features of the {len(features):,} samples are NaN or infinite")


def check_feature_sets(
    real: Float[Tensor, "real_count real_dim"],
    fake: Float[Tensor, "fake_count fake_dim"],
    least: int,
    purpose: str,
) -> None:
    """Raises UserError, too, if the two have other dimensions."""
    check_features(real, least, purpose)
    check_features(fake, least, purpose)
    if real.shape[1] != fake.shape[1]:
        raise UserError(
            f"{purpose}: the reference has features of {real.shape[1]:,} dimensions, the samples "
            f"of {fake.shape[1]:,}: they are of different feature networks"
        )
