"""A run's cycle on torch's meta device, whose tensors have shapes and types but no memory.

All code is the run's own, as it would run on a GPU. Within `meta_device`, stand-ins take the place
of what the meta device lacks: some kernels, autocast, and other ranks.
"""

from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._prims_common import compute_required_storage_length
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ganscale.plan.meta_autocast import meta_autocast
from ganscale.plan.networks import trainable
from ganscale.runtime import Runtime

META = torch.device("meta")


@contextmanager
def meta_device(ranks: int) -> Iterator[None]:
    """Within, a cycle runs on the meta device, as that of one of `ranks`."""
    with ExitStack() as stack:
        stack.enter_context(_MetaKernels())
        stack.enter_context(meta_autocast())
        if ranks > 1:
            stack.enter_context(_other_ranks(ranks))
        yield


class MetaRuntime(Runtime):
    """The runtime of rank 0 on the meta device, where DDP is replaced by the buckets that it holds.

    It starts as a single rank, so that a TrainingState does not compare itself with others.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__(META, 0, 1, None, None)
        self._has_buckets = ranks > 1
        self._averages = True

    def prepare(self, module: nn.Module, compression: str = "none") -> nn.Module:
        module = module.to(META)
        for parameter in trainable(module) if self._has_buckets else ():
            bucket = torch.empty_like(parameter)

            def into_bucket(parameter: Tensor, bucket: Tensor = bucket) -> None:
                if self._averages:
                    parameter.grad = bucket

            parameter.register_post_accumulate_grad_hook(into_bucket)
        return module

    @contextmanager
    def no_sync(self, wrapped: nn.Module) -> Iterator[None]:
        self._averages = False
        yield
        self._averages = True


@contextmanager
def _other_ranks(ranks: int) -> Iterator[None]:
    """Collectives have results of the right shape, and nothing else."""
    collectives = "torch.distributed._functional_collectives.all_reduce"
    with (
        mock.patch.multiple(
            torch.distributed,
            is_initialized=lambda: True,
            get_rank=lambda *_: 0,
            get_world_size=lambda *_: ranks,
            all_reduce=lambda *_, **__: None,
            all_gather=lambda *_, **__: None,
            barrier=lambda *_, **__: None,
        ),
        mock.patch(collectives, lambda tensor, *_: tensor.clone()),
    ):
        yield


class _Layout(NamedTuple):
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "_Layout":
        return cls(tensor.size(), tensor.stride(), tensor.dtype, tensor.device)

    def empty(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


class _MetaKernels(TorchDispatchMode):
    """Stands in for the kernels that the meta device lacks, and remembers what the others return:
    torch finds out their results' shapes in Python, which takes up to a millisecond each time."""

    def __init__(self) -> None:
        super().__init__()
        self._layouts: dict[Hashable, tuple[list[_Layout], pytree.TreeSpec]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().partition(".")[0]
        if name.startswith("aten::_fused_") and name.endswith("_"):
            return None  # an optimizer, which changes its tensors in place
        if name == "aten::batch_norm_update_stats":
            _, running_mean, running_var, _ = args
            return torch.empty_like(running_mean), torch.empty_like(running_var)
        if func.is_view or func._schema.is_mutable:
            return func(*args, **(kwargs or {}))
        leaves, spec = pytree.tree_flatten((args, kwargs))
        key = (
            func,
            spec,
            *(_Layout.of(x) if isinstance(x, Tensor) else (type(x), x) for x in leaves),
        )
        if (known := self._layouts.get(key)) is not None:
            layouts, spec = known
            return pytree.tree_unflatten([layout.empty() for layout in layouts], spec)
        result = func(*args, **(kwargs or {}))
        outputs, spec = pytree.tree_flatten(result)
        if all(_is_new(each, leaves) for each in outputs):
            self._layouts[key] = [_Layout.of(each) for each in outputs], spec
        return result


def _is_new(output: Any, inputs: list[Any]) -> bool:
    """A tensor with a storage of its own, as large as its shape needs."""
    if not isinstance(output, Tensor) or not output.is_meta:
        return False
    storage = output.untyped_storage()
    if any(isinstance(x, Tensor) and x.untyped_storage() is storage for x in inputs):
        return False
    length = compute_required_storage_length(output.shape, output.stride(), 0)
    return storage.nbytes() == length * output.itemsize
