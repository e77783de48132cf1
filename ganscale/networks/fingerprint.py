"""What a network computes, in a few numbers: to notice when its code changes under a checkpoint."""

import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ganscale.errors import UserError
from ganscale.networks.batch_groups import up_to_whole_groups
from ganscale.networks.forward import LowestPrecision, default_dtype, in_evaluation, run_network
from ganscale.random import drawing
from ganscale.randomness import normal

_SAMPLES = 4  # of a network that looks at groups of images, as many groups
_WAVES = 6
# Relative to the outputs; covers other devices.
_TOLERANCES = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}


@dataclass(frozen=True)
class Fingerprint:
    """The outputs of a network for a few fixed inputs, as sums.

    dtype: the lowest in which they were computed: float64, unless the network's code casts
    scale: root mean square of all outputs
    sums: of each output's products with `_WAVES` cosines of different frequencies, over sqrt(size)
    """

    dtype: str
    scale: float
    sums: list[float]

    def is_close(self, other: "Fingerprint") -> bool:
        """Whether both are of the same function, to rounding."""
        if not math.isfinite(self.scale) or not math.isfinite(other.scale):
            return math.isfinite(self.scale) == math.isfinite(other.scale)
        tolerance = max(_TOLERANCES[self.dtype], _TOLERANCES[other.dtype])
        if len(self.sums) != len(other.sums):
            return False
        allowed = tolerance * max(self.scale, other.scale)
        pairs = [*zip(self.sums, other.sums, strict=True), (self.scale, other.scale)]
        return all(abs(first - second) <= allowed for first, second in pairs)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Any) -> "Fingerprint":
        """Raises ValueError for anything that `to_json` did not make."""
        try:
            sums = [float(number) for number in stored["sums"]]
            found = cls(stored["dtype"], float(stored["scale"]), sums)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{stored!r} is not a network's fingerprint") from error
        if found.dtype not in _TOLERANCES or len(sums) % _WAVES or len(sums) < _SAMPLES * _WAVES:
            raise ValueError(f"{stored!r} is not a network's fingerprint")
        return found

    def check(self, stored: Any, what: str, how_to_allow: str) -> None:
        """Raises UserError if `what` computes something else than when `stored`, as JSON, was
        taken, and if that cannot be known."""
        try:
            is_same = self.is_close(Fingerprint.from_json(stored))
        except ValueError as error:
            raise UserError(
                f"another version of ganscale has saved {what}, and whether its code has changed "
                f"since cannot be known: accept this with {how_to_allow}"
            ) from error
        if not is_same:
            raise UserError(
                f"{what} computes something else than when its weights were saved, so its code has "
                f"changed: restore the code, or accept this with {how_to_allow}"
            )


@torch.no_grad()
def fingerprint(
    network: nn.Module, input_shape: tuple[int, ...], num_classes: int, *, is_critic: bool = False
) -> Fingerprint:
    """Of a network with inputs of (batch, *input_shape), which is left as it was: a generator in
    evaluation, as it makes samples, a critic in training, as it is always used."""
    first = next(network.parameters())
    slots = torch.arange(up_to_whole_groups(_SAMPLES, network))
    inputs = normal(0, "fingerprint", slots, math.prod(input_shape)).view(-1, *input_shape)
    inputs = (inputs.tanh() if len(input_shape) > 1 else inputs).to(first.device)  # images, latents
    # Classes from all over their range.
    labels = [(slots * num_classes // len(slots)).to(first.device)] if num_classes else []
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    wide = {k: t.double() if t.is_floating_point() else t for k, t in tensors.items()}
    lowest = LowestPrecision()
    with nullcontext() if is_critic else in_evaluation(network), lowest:
        try:
            with default_dtype(torch.float64), drawing(0, ("fingerprint",), slots):
                outputs = functional_call(network, wide, (inputs.double(), *labels))
        except Exception:  # its code has a float32 in it
            with drawing(0, ("fingerprint",), slots):
                outputs = run_network(network, inputs.to(first.dtype), *labels)
    dtype = str(lowest.dtype).removeprefix("torch.")
    flat = outputs.double().reshape(len(slots), -1)
    positions = torch.arange(flat.shape[1], dtype=torch.float64, device=flat.device)
    # Irrational frequencies, so that no shift or permutation of an image looks the same.
    waves = [torch.cos(positions * math.sqrt(k * k + 1)) for k in range(_WAVES)]
    sums = torch.stack([flat @ wave for wave in waves]) / math.sqrt(flat.shape[1])
    scale = flat.square().mean().sqrt()
    return Fingerprint(dtype, float(scale), sums.flatten().tolist())
