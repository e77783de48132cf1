"""Loaders that count the bad samples of the batches that they return."""

from collections import Counter
from typing import Any

from ganscale.data.batch import Batch
from ganscale.data.loader import Loader
from ganscale.data.streaming.loader import StreamLoader


class _Counting:
    """bad_samples: by (shard, reason)"""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.bad_samples: Counter[tuple[str, str]] = Counter()

    def __next__(self) -> Batch:
        batch = super().__next__()  # type: ignore[misc]
        self.bad_samples.update((bad.shard, bad.reason) for bad in batch.bad_samples)
        return batch


class CountingLoader(_Counting, Loader):
    pass


class CountingStreamLoader(_Counting, StreamLoader):
    pass
