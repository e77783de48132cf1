"""Checks that the replicas of all ranks are bitwise equal.

Every rank applies the same averaged gradients to the same weights, so a difference is a bug or a
broken device, which a broadcast of one rank's weights would hide."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from ganscale.errors import ReplicaError
from ganscale.runtime import Runtime


def audit_replicas(tensors: Mapping[str, Tensor], runtime: Runtime) -> None:
    """Compares a fingerprint of every tensor across ranks; one small collective.

    Raises ReplicaError, on every rank, with the first tensor that differs and the ranks that differ
    from the majority.
    """
    if runtime.world_size == 1:
        return
    fingerprints = torch.stack([_fingerprint(tensor) for tensor in tensors.values()])
    if runtime.is_equal_everywhere(fingerprints):
        return
    by_rank = torch.tensor(runtime.all_gather_object(fingerprints.tolist()))
    differs = (by_rank != by_rank[0]).any(dim=0)
    first, count = int(differs.nonzero()[0]), int(differs.sum())
    values = by_rank[:, first].tolist()
    majority, _ = Counter(values).most_common(1)[0]  # rank 0's in a tie
    ranks = [str(rank) for rank, value in enumerate(values) if value != majority]
    raise ReplicaError(
        f"replicas differ: `{list(tensors)[first]}` on rank {', '.join(ranks)} of "
        f"{runtime.world_size} ({count} of {len(tensors)} tensors differ in all); "
        "nothing was saved, older checkpoints are untouched"
    )


def _fingerprint(tensor: Tensor) -> Tensor:
    """XOR and sum of a tensor's elements as bit patterns, in one int64: it shows a change of one
    element's last place, and of all signs, but not two elements swapped."""
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    as_integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[plain.itemsize]
    total = plain.view(as_integers).sum(dtype=torch.int64)
    spread = total * 0x9E3779B97F4A7C1  # over all bits
    return torch.hash_tensor(plain).view(torch.int64) ^ spread
