"""Are the replicas of all ranks the same bits? They must be: every rank applies the same averaged
gradients to the same weights. A difference is a bug or a broken device, and training on would only
hide it; broadcasting one rank's weights would, too."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from ganscale.errors import ReplicaError
from ganscale.runtime import Runtime


def audit_replicas(tensors: Mapping[str, Tensor], runtime: Runtime) -> None:
    """Compares a fingerprint of every tensor over the ranks; one small collective.

    The fingerprint is the XOR and the sum of a tensor's elements as bit patterns: a change of one
    unit in the last place of one element shows, and a sign turned everywhere; an exchange of two
    elements does not. Raises ReplicaError, on every rank, with the first tensor that
    differs and the ranks that differ from most.
    """
    if runtime.world_size == 1:
        return
    hashes = torch.stack([_fingerprint(tensor) for tensor in tensors.values()])
    if runtime.is_equal_everywhere(hashes):
        return
    of_ranks = torch.tensor(runtime.all_gather_object(hashes.tolist()))
    differs = (of_ranks != of_ranks[0]).any(dim=0)
    first, count = int(differs.nonzero()[0]), int(differs.sum())
    column = of_ranks[:, first].tolist()
    usual, _ = Counter(column).most_common(1)[0]  # rank 0's, where no side has the majority
    ranks = [rank for rank, value in enumerate(column) if value != usual]
    raise ReplicaError(
        f"replicas differ: `{list(tensors)[first]}` on rank {', '.join(map(str, ranks))} of "
        f"{runtime.world_size} ({count} of {len(tensors)} tensors differ in all); "
        "nothing was saved, the checkpoints before are untouched"
    )


def _fingerprint(tensor: Tensor) -> Tensor:
    """One int64 of a tensor's bits."""
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    as_integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[plain.itemsize]
    total = plain.view(as_integers).sum(dtype=torch.int64)
    return torch.hash_tensor(plain).view(torch.int64) ^ (
        total * 0x9E3779B97F4A7C1
    )  # spread over all bits
