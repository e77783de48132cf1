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

    The fingerprint is the XOR of a tensor's elements as bit patterns: a change of one unit in the
    last place of one element shows. Raises ReplicaError, on every rank, with the first tensor that
    differs and the ranks that differ from most.
    """
    if runtime.world_size == 1:
        return
    hashes = torch.stack(
        [torch.hash_tensor(tensor).view(torch.int64) for tensor in tensors.values()]
    )
    if runtime.is_equal_everywhere(hashes):
        return
    of_ranks = torch.tensor(runtime.gather(hashes.tolist()))
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
