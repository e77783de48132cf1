"""The options that generator and critic share."""

from collections.abc import Sequence
from dataclasses import dataclass

from ganscale.errors import UserError
from ganscale.networks.shapes import (
    ImageShape,
    image_shape,
    require_positive,
    require_stages,
    stage_widths,
)


@dataclass(frozen=True)
class Stages:
    """One for each resolution, from the lowest up."""

    shape: ImageShape
    widths: list[int]
    bfloat16_stages: int

    @classmethod
    def of(
        cls,
        sample_shape: tuple[int, ...],
        widths: int | list[int] | None,
        channel_base: int | None,
        channel_max: int | None,
        bfloat16_stages: int,
    ) -> "Stages":
        """Raises UserError for impossible sizes."""
        shape = image_shape(sample_shape, "stylegan2")
        if widths is None:
            base = 32768 if channel_base is None else channel_base
            most = 512 if channel_max is None else channel_max
            require_positive("stylegan2", channel_base=base, channel_max=most)
            resolutions = [4 << stage for stage in range(shape.doublings + 1)]
            widths = [max(1, min(base // each, most)) for each in resolutions]
        elif channel_base is not None or channel_max is not None:
            raise UserError(
                "stylegan2 takes either widths or channel_base and channel_max, not both"
            )
        widths = stage_widths("stylegan2", widths, shape)
        require_stages("stylegan2", bfloat16_stages, len(widths))
        return cls(shape, widths, bfloat16_stages)

    def size(self, stage: int) -> tuple[int, int]:
        """(height, width)"""
        height, width = self.shape.grid
        return height << stage, width << stage

    def is_bfloat16(self, stage: int) -> bool:
        return stage >= len(self.widths) - self.bfloat16_stages


def require_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises UserError for a value that is not one of the choices."""
    if value not in choices:
        *first, last = (f'"{choice}"' for choice in choices)
        listed = f"{', '.join(first)} or {last}"
        raise UserError(f"{name} of stylegan2 must be {listed}, not {value!r}")
