"""The adaptive controller of the probability: Karras et al. 2020 (arXiv:2006.06676), section 3."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ganscale.runtime import Runtime
from ganscale.schema import AdaptiveConfig


class AdaptiveProbability:
    """Holds the mean sign of real logits, the paper's r_t, at a target: above it, the critic
    overfits, and the probability rises; below, it falls.

    The probability is a whole number of images over `full_images`, in [0, 1], and is moved by
    counts of signs, so that adding up over ranks rounds nothing (a logit within rounding of 0 may
    still count differently). It stays on the device: no step waits for it. Neither the paper nor
    its code bounds it from above: a probability beyond 1 would act like 1 until it came back.
    """

    def __init__(
        self,
        config: AdaptiveConfig,
        start: float,
        runtime: Runtime,
        guard_tripped: Float[Tensor, ""],
    ) -> None:
        """guard_tripped: above 0 once an update was skipped; nothing is observed from then on"""
        self._config, self._runtime, self._guard_tripped = config, runtime, guard_tripped
        level = round(start * config.full_images)
        self._level = torch.full((), level, dtype=torch.int64, device=runtime.device)
        # Since the last adjustment: the sum of this rank's signs, its logits, and its images.
        self._counts = torch.zeros(3, dtype=torch.int64, device=runtime.device)
        self._sign_rate = torch.full((), torch.nan, dtype=torch.float64, device=runtime.device)

    def probability(self) -> Float[Tensor, ""]:
        return self._level.double() / self._config.full_images

    def observe(self, real_logits: Float[Tensor, "batch *patches"], images_seen: int) -> None:
        """Takes this rank's logits of a critic step, after which the critic has seen that many
        images; adjusts the probability if that is due."""
        positive = (real_logits > 0).sum() - (real_logits < 0).sum()
        sizes = real_logits.numel(), len(real_logits)
        counts = torch.stack([positive, *(torch.full_like(positive, size) for size in sizes)])
        self._counts += torch.where(self._guard_tripped > 0, 0, counts)
        every = self._config.every_images
        if (
            images_seen // every
            > (images_seen - len(real_logits) * self._runtime.world_size) // every
        ):
            self._adjust()

    def _adjust(self) -> None:
        signs, logits, images = self._runtime.all_reduce_sum(self._counts).unbind()
        sign_rate = signs.double() / logits
        direction = (sign_rate - self._config.target).sign().long()
        level = (self._level + direction * images).clamp(0, self._config.full_images)
        is_held = self._guard_tripped > 0
        self._level = torch.where(is_held, self._level, level)
        self._sign_rate = torch.where(is_held, self._sign_rate, sign_rate)
        self._counts = torch.where(is_held, self._counts, 0)

    def metrics(self) -> dict[str, float]:
        """Waits for the device."""
        rate = self._sign_rate.item()
        return {} if rate != rate else {"augment/sign_rate": rate}

    def audited(self) -> dict[str, Tensor]:
        return {"augmentation.level": self._level}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers. Collective; waits for the device."""
        rate = self._sign_rate.item()
        return {
            "level": int(self._level.item()),
            "full_images": self._config.full_images,
            "counts": self._runtime.all_reduce_sum(self._counts).tolist(),
            "sign_rate": None if rate != rate else rate,
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """state: None of a run that had no controller"""
        if state is None:
            return
        # The same probability, if full_images has been changed since. Older versions stored neither
        # that nor the counts.
        full_images = state.get("full_images", self._config.full_images)
        self._level.fill_(round(state["level"] * self._config.full_images / full_images))
        self._level.clamp_(0, self._config.full_images)
        if self._runtime.is_main:  # they are summed over the ranks again
            self._counts = torch.tensor(state.get("counts", [0, 0, 0]), device=self._runtime.device)
        rate = torch.nan if state["sign_rate"] is None else state["sign_rate"]
        self._sign_rate.fill_(rate)
