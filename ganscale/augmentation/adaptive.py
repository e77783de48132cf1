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

    The probability is a whole number of images over `full_images`, in [0, 1], and what it follows
    from are whole numbers of logits. So it is the same, bit by bit, however the images are split
    over ranks. It lives on the device, which nobody waits for. Neither the paper nor its code
    bounds it from above: a probability that went beyond 1 would act like 1 until it came back.
    """

    def __init__(self, config: AdaptiveConfig, start: float, runtime: Runtime) -> None:
        self._config, self._runtime = config, runtime
        level = round(start * config.full_images)
        self._level = torch.full((), level, dtype=torch.int64, device=runtime.device)
        # This rank's logits since the last adjustment: the sum of their signs, and their number.
        self._signs = torch.zeros(2, dtype=torch.int64, device=runtime.device)
        self._sign_rate = torch.full((), torch.nan, dtype=torch.float64, device=runtime.device)
        self._adjusted_at = 0  # images seen

    def probability(self) -> Float[Tensor, ""]:
        return self._level.double() / self._config.full_images

    def observe(self, real_logits: Tensor, images_seen: int) -> None:
        """Takes this rank's logits of a critic step, after which the critic has seen that many
        images; adjusts the probability if that is due."""
        positive = (real_logits > 0).sum() - (real_logits < 0).sum()
        self._signs += torch.stack([positive, torch.full_like(positive, real_logits.numel())])
        every = self._config.every_images
        if images_seen // every > self._adjusted_at // every:
            self._adjust(images_seen - self._adjusted_at)
            self._adjusted_at = images_seen

    def _adjust(self, images: int) -> None:
        signs, count = self._runtime.all_reduce_sum(self._signs).double().unbind()
        self._sign_rate = signs / count
        direction = (self._sign_rate - self._config.target).sign().long()
        self._level = (self._level + direction * images).clamp(0, self._config.full_images)
        self._signs = torch.zeros_like(self._signs)

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
            "signs": self._runtime.all_reduce_sum(self._signs).tolist(),
            "sign_rate": None if rate != rate else rate,
            "adjusted_at": self._adjusted_at,
        }

    def load_state_dict(self, state: dict[str, Any] | None, images_seen: int) -> None:
        """state: None of a run that had no controller, whose logits of so many images it has not
        seen"""
        if state is None:
            self._adjusted_at = images_seen
            return
        self._level.fill_(state["level"])
        self._level.clamp_(0, self._config.full_images)  # which may have been changed since
        # They are summed over the ranks again, so one rank takes all.
        self._signs = torch.tensor(state["signs"], device=self._runtime.device)
        self._signs *= self._runtime.is_main
        rate = torch.nan if state["sign_rate"] is None else state["sign_rate"]
        self._sign_rate.fill_(rate)
        self._adjusted_at = state["adjusted_at"]
