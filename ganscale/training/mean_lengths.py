"""The moving averages with which the generator's penalties compare path lengths."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ganscale.objectives.objective import WeightedGeneratorPenalty
from ganscale.runtime import Runtime


class MeanLengths:
    """For each penalty, a <- (1 - decay) a + decay E[length] after every update in which it is due,
    with the mean over all images of the global batch; starting from 0, as in StyleGAN2's code.

    They keep their place in device memory, where captured steps read them; the host waits for them
    only to log or save. An update that the guard skips does not change them.
    """

    def __init__(
        self,
        penalties: Mapping[str, WeightedGeneratorPenalty],
        runtime: Runtime,
        guard_tripped: Float[Tensor, ""],
    ) -> None:
        self._runtime, self._guard_tripped = runtime, guard_tripped
        self._decays = {name: penalty.decay for name, penalty in penalties.items()}
        self._means = {
            name: torch.zeros((), dtype=torch.float64, device=runtime.device) for name in penalties
        }

    def of(self, penalties: Sequence[str]) -> dict[str, Float[Tensor, ""]]:
        """Changed in place by `observe`."""
        return {name: self._means[name] for name in penalties}

    @torch.no_grad()
    def observe(self, lengths: Mapping[str, Float[Tensor, " batch"]]) -> None:
        """Takes the lengths of this rank's images after an update, for each penalty that was due.
        Collective."""
        if not lengths:
            return
        local = torch.stack([each.double().mean() for each in lengths.values()])
        means = self._runtime.all_reduce_sum(local) / self._runtime.world_size
        for name, mean in zip(lengths, means.unbind(), strict=True):
            old = self._means[name]
            new = torch.lerp(old, mean, self._decays[name])
            old.copy_(torch.where(self._guard_tripped > 0, old, new))

    def metrics(self) -> dict[str, float]:
        """What a row shows of it. Waits for the device."""
        return {f"penalty/{name}_average": mean.item() for name, mean in self._means.items()}

    def audited(self) -> dict[str, Tensor]:
        """What has to be the same bits on all ranks."""
        return {f"mean_lengths.{name}": mean for name, mean in self._means.items()}

    def state_dict(self) -> dict[str, float]:
        """Plain numbers. Waits for the device."""
        return {name: mean.item() for name, mean in self._means.items()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """state: of a run that may have had other penalties; new ones start from 0"""
        for name in self._means.keys() & state.keys():
            self._means[name].fill_(state[name])
