"""A user's own generator that damages the shards of its run as it is built.

So the damage is done after the shards were checked and before the first is read, on whatever rank
comes first; what it does twice changes nothing.
"""

import contextlib
import json
import os
from pathlib import Path

from ganscale.networks.dcgan import DCGANGenerator
from tests.helpers.tars import overwrite


class Generator(DCGANGenerator):
    """As `dcgan`; `damage`, DATA.json beside the folder DATA of the shards, holds a list of
    [what, shard, offset, bytes in hexadecimal]."""

    def __init__(
        self,
        latent_dim: int,
        sample_shape: tuple[int, ...],
        num_classes: int = 0,
        *,
        width: int = 64,
        damage: str = "",
    ) -> None:
        super().__init__(latent_dim, sample_shape, num_classes, width=width)
        plan = Path(damage)
        for what, shard, offset, data in json.loads(plan.read_text()):
            do(what, plan.with_suffix("") / shard, offset, bytes.fromhex(data))


def do(what: str, path: Path, offset: int, data: bytes) -> None:
    if what == "cut":
        os.truncate(path, offset)
    elif what == "overwrite":
        overwrite(path, offset, data)
    elif what == "delete":
        path.unlink(missing_ok=True)
    elif what == "replace by a folder":
        with contextlib.suppress(OSError):
            path.unlink()
        path.mkdir(exist_ok=True)
