"""Autocast on the meta device, which torch does not have, by the rules that it has for CUDA."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.weak import WeakIdKeyDictionary


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Names of torch's Python functions, from the lists for CUDA in ATen/autocast_mode.h: computed in
# autocast's precision, in float32, in float32 by a kernel that casts itself, and in float32 if any
# argument has it.
IN_LOWER_PRECISION = _names(
    """
    addbmm addmm addmv addr baddbmm bmm chain_matmul conv1d conv2d conv3d conv_tbc
    conv_transpose1d conv_transpose2d conv_transpose3d convolution einsum gru_cell
    linalg_multi_dot linalg_vecdot linear lstm_cell matmul mm mv prelu rnn_relu_cell
    rnn_tanh_cell scaled_dot_product_attention
    """
)
IN_FLOAT32 = _names(
    """
    acos asin binary_cross_entropy_with_logits cdist cosh cosine_embedding_loss
    cosine_similarity dist erfinv exp expm1 frobenius_norm group_norm hinge_embedding_loss
    huber_loss interpolate kl_div l1_loss layer_norm log log10 log1p log2 logsumexp
    margin_ranking_loss mse_loss multi_margin_loss multilabel_margin_loss native_layer_norm
    nll_loss nuclear_norm pdist poisson_nll_loss pow reciprocal renorm rms_norm rsqrt sinh
    smooth_l1_loss soft_margin_loss softplus tan triplet_margin_loss
    """
)
TO_FLOAT32 = _names(
    """
    cumprod cumsum linalg_matrix_norm linalg_vector_norm log_softmax norm prod softmax sum
    """
)
PROMOTED = _names(
    """
    addcdiv addcmul atan2 bilinear cat cross dot grid_sample grid_sampler index_put scatter_add
    stack tensordot vdot
    """
)

_contexts: list["_Autocast"] = []  # the innermost last


@contextmanager
def meta_autocast() -> Iterator[None]:
    """Within, `torch.autocast` is for the meta device."""

    def is_enabled(_: str | None = None) -> bool:
        return bool(_contexts) and _contexts[-1].is_enabled

    def dtype(_: str) -> torch.dtype:
        return _contexts[-1].dtype if _contexts else torch.bfloat16

    with (
        mock.patch.multiple(
            torch, autocast=_Autocast, is_autocast_enabled=is_enabled, get_autocast_dtype=dtype
        ),
        mock.patch.multiple(torch.amp, autocast=_Autocast, is_autocast_available=lambda _: True),
    ):
        yield


class _Autocast(TorchFunctionMode):
    """`torch.autocast` for the functions that a network calls itself. The networks' parameters are
    cast once, as there."""

    def __init__(
        self, device_type: str, dtype: torch.dtype = torch.bfloat16, enabled: bool = True, **_: Any
    ) -> None:
        super().__init__()
        self.dtype, self.is_enabled = dtype, enabled
        self._casts = WeakIdKeyDictionary()

    def __enter__(self) -> "_Autocast":
        _contexts.append(self)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        _contexts.remove(self)
        self._casts.clear()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        options, name = {**(kwargs or {})}, getattr(func, "__name__", "")
        if not self.is_enabled or self is not _contexts[-1]:
            return func(*args, **options)
        cast = None
        if name in IN_LOWER_PRECISION:
            cast = self._lower
        elif name in IN_FLOAT32 or (
            name in PROMOTED and any(map(_is_float32, tree_iter((args, options))))
        ):
            cast = _float32
        elif name in TO_FLOAT32 and args and _is_cast(args[0]):
            options.setdefault("dtype", torch.float32)
        if cast is not None:
            args, options = tree_map(cast, args), tree_map(cast, options)
        return func(*args, **options)

    def _lower(self, value: Any) -> Any:
        if not _is_cast(value) or value.dtype == self.dtype:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(self.dtype)
        if (cast := self._casts.get(value)) is None:
            self._casts[value] = cast = value.to(self.dtype)
        return cast


def _is_float32(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _float32(value: Any) -> Any:
    return value.float() if _is_cast(value) else value


def _is_cast(value: Any) -> bool:
    """Whether autocast casts this argument: never float64."""
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return is_float and value.dtype != torch.float64
