"""The known pipelines, and one of them from a run's settings."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ganscale.augmentation import ada, diffaugment
from ganscale.augmentation.transformations import Apply, Pipeline, Transformation
from ganscale.errors import UserError
from ganscale.importing import nearest


class _Known(NamedTuple):
    transformations: tuple[Transformation, ...]
    defaults: tuple[str, ...]  # the categories that are on where no strengths are given
    apply: Apply


PIPELINES = {
    "ada": _Known(ada.TRANSFORMATIONS, ada.DEFAULT_CATEGORIES, ada.augment),
    "diffaugment": _Known(
        diffaugment.TRANSFORMATIONS, diffaugment.DEFAULT_CATEGORIES, diffaugment.augment
    ),
}


def build_pipeline(name: str, strengths: Mapping[str, float], channels: int) -> Pipeline:
    """The pipeline of this name with a strength for each category or transformation in `strengths`,
    the transformation's own before its category's; what is not named is off. Without any, the
    pipeline's default categories are on.

    In a category, transformations that need three channels are left out for gray images. Raises
    UserError for one of them by name, for unknown names, and for a strength outside [0, 1].
    """
    known = PIPELINES[name]
    categories = dict.fromkeys(each.category for each in known.transformations)
    names = dict.fromkeys(each.name for each in known.transformations)
    for given, strength in strengths.items():
        _check(given, strength, name, (*categories, *(n for n in names if n not in categories)))
    given = dict(strengths) or dict.fromkeys(known.defaults, 1.0)
    of_each = []
    for each in known.transformations:
        is_impossible = each.needs_color and channels != 3
        if is_impossible and strengths.get(each.name, 0.0) > 0:
            raise UserError(
                f"augmentation.strengths.{each.name} needs images of three channels, "
                f"data.channels is {channels}"
            )
        strength = given.get(each.name, given.get(each.category, 0.0))
        of_each.append(0.0 if is_impossible else float(strength))
    return Pipeline(known.transformations, tuple(of_each), known.apply)


def _check(given: str, strength: float, pipeline: str, known: Iterable[str]) -> None:
    key = f"augmentation.strengths.{given}"
    if given not in known:
        raise UserError(f"{key}: unknown{nearest(given, known)}; {pipeline} has {', '.join(known)}")
    if not 0 <= strength <= 1:
        raise UserError(f"{key} must be between 0 and 1, not {strength}")
