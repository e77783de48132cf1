"""Counts the bytes of the tensors that are alive at the same time."""

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_BLOCK_BYTES = 512  # to which the CUDA caching allocator rounds up


class LiveBytes(TorchDispatchMode):
    """Counts every storage that an operator returns within, from then until nothing refers to it.

    So it finds whatever Python and autograd keep alive, on every device, also on the meta device,
    whose tensors have sizes but no memory. It does not see what a kernel needs while it runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that were made elsewhere."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            # While a storage lives, so does its Python object, which torch gives it only once.
            key = id(storage)
            if key in self._storages:
                continue
            rounded = -(-storage.nbytes() // _BLOCK_BYTES) * _BLOCK_BYTES
            self._storages[key] = weakref.ref(storage, partial(self._forget, key, rounded))
            self.now += rounded
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int, count: int, _: object) -> None:
        del self._storages[key]
        self.now -= count

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.add(each for each in tree_iter(output) if isinstance(each, Tensor))
        return output
