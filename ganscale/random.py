"""Random numbers in a network's forward, as functions of the slots of its images.

    noise = normal_like(maps[:, :1], "noise/64x64")
    is_mixed = bernoulli_like(latents[:, 0], "mixing", 0.9)

A number depends on the run's seed, the purpose of the forward, the image's slot, the name and the
element, and on nothing else. So it is the same on every number of ranks, in micro-batches, where
activation checkpointing computes a forward again, after a resume, and whatever else is drawn.

Training, sampling and evaluation wrap every forward in `drawing`, which has seed, purposes and
slots. The bits come from `randomness.squares`, with a key for each seed, purpose and name.
"""

import math
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ganscale.errors import UserError
from ganscale.importing import users_line
from ganscale.randomness import squares, squares_key
from ganscale.tensor_cache import cached_tensors

_ELEMENT_BITS = 30  # of a counter; the others are the slot's
_SECOND_WORDS = 1 << (_ELEMENT_BITS - 1)  # the element at which those of normal numbers begin
_FEW = 1 << 20  # numbers; for more, memory matters more than launches
_EXPECTATIONS, _RECENT_FORWARDS = 256, 512  # how many are kept


def normal_like(x: Tensor, name: str) -> Float[Tensor, "batch *shape"]:
    """Standard normal numbers of x's shape, dtype and device. They are computed in float32, or in
    float64 for an x in float64.

    x: (batch, ...) of any floating-point type
    name: identifies these numbers within a forward

    Raises UserError outside of a forward, for a name that the forward has drawn before, and for an
    x that is not as long as the batch.
    """
    return _draw(x, name, True).to(x.dtype)


def uniform_like(x: Tensor, name: str) -> Float[Tensor, "batch *shape"]:
    """Uniform numbers in [0, 1), of 24 random bits or as many as x's dtype holds; otherwise like
    `normal_like`."""
    numbers = _draw(x, name, False).to(x.dtype)
    largest = 1 - torch.finfo(x.dtype).eps / 2
    return numbers.clamp_max(largest) if x.itemsize < 4 else numbers  # those may be rounded to 1


def bernoulli_like(
    x: Tensor, name: str, probability: float | Tensor
) -> Float[Tensor, "batch *shape"]:
    """1 with this probability, otherwise 0; the rest is as in `normal_like`. Also raises UserError
    for a number outside [0, 1]. A tensor is not checked: that would wait for the device."""
    if not isinstance(probability, Tensor) and not 0 <= probability <= 1:
        raise _mistake(f"{name!r} is drawn with a probability of {probability}: it must be 0 to 1")
    return (_draw(x, name, False) < probability).to(x.dtype)


@contextmanager
def drawing(
    seed: int, purposes: tuple[str, ...], slots: Int64[Tensor, " images"] | None
) -> Iterator[None]:
    """Within, one forward may draw. Its batch holds the images of `slots` for the first of
    `purposes`, then those of the same slots for the next one, and so on.

    slots: None for a forward that must not draw
    """
    if "torch._dynamo" in sys.modules:
        _keep_out_of_graphs()
    forward = None if slots is None else _Forward(seed, purposes, slots)
    token = _current.set(forward)
    try:
        yield
        if forward is not None:
            forward.remember()
    finally:
        _current.reset(token)
        if forward is not None:
            forward.close()


class _Request(NamedTuple):
    name: str
    is_normal: bool
    columns: int
    dtype: torch.dtype


class _Forward:
    """Draws for one forward, and for its recomputation in a backward.

    The first draw also makes whatever the previous forward of these purposes drew: a launch for all
    layers takes as long as one for a small layer.
    """

    def __init__(self, seed: int, purposes: tuple[str, ...], slots: Tensor) -> None:
        self.rows = len(purposes) * len(slots)
        self._site, self._slots = (seed, purposes), slots
        self._expected = _expected.get(self._site, ())
        self._drawn: dict[str, _Request] = {}
        self._made: dict[_Request, Tensor] = {}
        # Autograd numbers its nodes in the order in which forwards make them.
        self._first_node, self._next_node = torch.autograd._get_sequence_nr(), sys.maxsize
        self.graph_task = torch._C._current_graph_task_id()  # -1 outside of a backward
        if torch.is_grad_enabled():
            _recent.append(self)

    def has_made(self, node: int) -> bool:
        return self._first_node <= node < self._next_node

    def draw(self, request: _Request, device: torch.device) -> Tensor:
        if request.name in self._drawn:
            raise _mistake(
                f"a forward draws {request.name!r} twice, which would be the same numbers: give "
                f"each draw a name of its own, such as {f'{request.name}/2'!r}"
            )
        if request not in self._made:
            together = [request]
            if request in self._expected:
                left = [r for r in self._expected if r.name not in self._drawn]
                together = [r for r in left if r.dtype == request.dtype]
            self._made |= self.make(together, device)
        self._drawn[request.name] = request
        return self._made.pop(request)

    def make(self, requests: list[_Request], device: torch.device) -> dict[_Request, Tensor]:
        """(rows, columns) each."""
        few = self.rows * sum(r.columns for r in requests) <= _FEW
        columns = _cached_columns if few else _columns
        names, elements, pairs = columns(tuple(requests), device)
        keys = _keys(*self._site, tuple(r.name for r in requests), device)
        slots = self._slots.to(device)[:, None]
        counter = torch.add(elements, slots, alpha=1 << _ELEMENT_BITS)
        keys = keys[..., names] if len(requests) > 1 else keys
        numbers = squares(counter, keys, requests[0].dtype).flatten(0, 1)
        first, second, uniforms = numbers.tensor_split([pairs, 2 * pairs], dim=1)
        normals = _box_muller(first, second) if pairs else first
        made, ends = {}, {True: 0, False: 0}
        for request in requests:
            source = normals if request.is_normal else uniforms
            start = ends[request.is_normal]
            made[request] = source[:, start : start + request.columns]
            ends[request.is_normal] += _width(request)
        return made

    def remember(self) -> None:
        """Tells the next forward of these purposes what to make together: a hint, which changes no
        number."""
        if len(_expected) >= _EXPECTATIONS:
            _expected.clear()
        few, left = [], _FEW // max(1, self.rows)
        for request in self._drawn.values():
            if request.columns <= left:
                few.append(request)
                left -= request.columns
        _expected[self._site] = tuple(few)

    def close(self) -> None:
        self._next_node = torch.autograd._get_sequence_nr()
        self._made.clear()


_current: ContextVar[_Forward | None] = ContextVar("forward", default=None)
_expected: dict[tuple[int, tuple[str, ...]], tuple[_Request, ...]] = {}
_recent: deque[_Forward] = deque(maxlen=_RECENT_FORWARDS)


def _mistake(message: str) -> UserError:
    """With the line of the user's code that draws."""
    place = users_line(traceback.extract_stack())
    return UserError(message if place is None else f"{message} ({place})")


def _drawn_like(x: Tensor, name: str, is_normal: bool) -> Tensor:
    """Of x's shape and device, in float32 or float64."""
    forward, is_repeated = _current.get(), False
    graph_task = torch._C._current_graph_task_id()
    if graph_task != -1 and (forward is None or forward.graph_task != graph_task):
        forward, is_repeated = _forward_of(torch._C._current_autograd_node()), True
    if forward is None:
        raise _mistake(
            f"{name!r} is drawn outside of a forward of training or sampling: wrap the forward in "
            "`ganscale.random.drawing(seed, purposes, slots)`"
        )
    if x.ndim == 0 or len(x) != forward.rows:
        size = f"{len(x)} rows" if x.ndim else "no batch dimension"
        raise _mistake(
            f"{name!r} is drawn for a tensor of {size} in a forward of {forward.rows} images: "
            "numbers are drawn for images, along the first dimension"
        )
    if not x.is_floating_point():
        raise _mistake(f"{name!r} is drawn like a tensor of {x.dtype}: it needs real numbers")
    columns = math.prod(x.shape[1:])
    if columns > _SECOND_WORDS:
        raise _mistake(
            f"{name!r} is drawn for {columns:,} elements of an image, but at most "
            f"{_SECOND_WORDS:,} are possible: draw for one channel, normal_like(maps[:, :1], ...)"
        )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    request = _Request(name, is_normal, columns, dtype)
    with torch.no_grad():
        if is_repeated:  # a recomputation may repeat any part, more than once
            numbers = forward.make([request], x.device)[request]
        else:
            numbers = forward.draw(request, x.device)
        # `data`, since views share the count of changes in place: one of them would invalidate
        # all numbers that were made together.
        return numbers.view(x.shape).data


_draw: Callable[[Tensor, str, bool], Tensor] = _drawn_like


@lru_cache(maxsize=1)
def _keep_out_of_graphs() -> None:
    """Keeps torch.compile from tracing `_draw`. Importing the compiler takes seconds, so only if it
    is imported already."""
    global _draw
    _draw = torch.compiler.disable(_drawn_like)  # type: ignore[assignment]


def _forward_of(node: Any) -> _Forward | None:
    """The forward that made this node of autograd's graph, whose backward asks for what activation
    checkpointing has not kept. The newest match wins, since a forward may run inside another."""
    if node is None:
        return None
    number = node._sequence_nr()
    return next((each for each in reversed(_recent) if each.has_made(number)), None)


def _width(request: _Request) -> int:
    """Columns that a request takes up: normal numbers come in pairs."""
    return request.columns + request.columns % 2 if request.is_normal else request.columns


@cached_tensors(maxsize=_EXPECTATIONS)
def _keys(
    seed: int, purposes: tuple[str, ...], names: tuple[str, ...], device: torch.device
) -> Int64[Tensor, "purposes 1 names"]:
    """Copied to the device once."""
    keys = [[[squares_key(repr((seed, purpose, name))) for name in names]] for purpose in purposes]
    return torch.tensor(keys).to(device)


def _columns(
    requests: tuple[_Request, ...], device: torch.device
) -> tuple[Int64[Tensor, " columns"], Int64[Tensor, " columns"], int]:
    """The name, by its index, and the element of each number of an image: first words of all pairs
    of normal numbers, their second words, uniform numbers. And how many pairs there are."""
    normals = [(i, _width(r) // 2, 0) for i, r in enumerate(requests) if r.is_normal]
    seconds = [(i, pairs, _SECOND_WORDS) for i, pairs, _ in normals]
    uniforms = [(i, r.columns, 0) for i, r in enumerate(requests) if not r.is_normal]
    parts = normals + seconds + uniforms
    names = [torch.full((count,), i, device=device) for i, count, _ in parts]
    elements = [torch.arange(first, first + n, device=device) for _, n, first in parts]
    return torch.cat(names), torch.cat(elements), sum(pairs for _, pairs, _ in normals)


_cached_columns = cached_tensors(maxsize=32)(_columns)


def _box_muller(
    first: Float[Tensor, "rows pairs"], second: Float[Tensor, "rows pairs"]
) -> Float[Tensor, "rows numbers"]:
    """Two independent standard normal numbers from each pair of uniform ones, side by side."""
    radius = torch.log1p(-first).mul_(-2).sqrt_()
    angle = second * (2 * math.pi)
    circle = torch.stack([torch.cos(angle), torch.sin(angle)], dim=-1)
    return circle.mul_(radius[..., None]).flatten(1)
