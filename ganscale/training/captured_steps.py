"""Steps as CUDA graphs: their operators are recorded once and then started by a single launch.

A graph repeats operators on the same memory, so whatever changes from step to step has to be in
tensors: a batch is copied to where the graph reads it, numbers such as a learning rate are scalars
there, and results are copied out before the next replay overwrites them.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ganscale.errors import UserError
from ganscale.schedules import Schedule
from ganscale.schema import Config
from ganscale.tensor_cache import holding_cached_tensors

Number = float | Tensor
Step = Callable[[Any, Mapping[str, Number]], Any]
Capture = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]
"""Takes a function without arguments; returns its outputs and one that recomputes them in place."""

WARM_UP = 3  # steps of a kind before it is captured: they make caches and states


def captures_steps(config: Config, device: torch.device, world_size: int) -> bool:
    """Whether steps are captured. Raises UserError if they are asked for where they cannot be."""
    training = config.training
    if training.cuda_graphs == "false":
        return False
    betas = *config.optimizer.critic.betas, *config.optimizer.generator.betas
    obstacle = None
    if device.type != "cuda":
        obstacle = f"the device is {device.type}"
    elif world_size > 1:
        obstacle = "several ranks exchange gradients by DDP, outside of a graph"
    elif training.compile:
        obstacle = "`training.compile` starts kernels in its own way"
    elif training.precision == "float64":
        obstacle = "torch's fused optimizers read rates on the device in float32"
    elif any(isinstance(beta, Schedule) for beta in betas):
        obstacle = "torch's fused Adam cannot read betas that have a schedule from the device"
    if obstacle and training.cuda_graphs == "true":
        raise UserError(f"`training.cuda_graphs=true` is not possible, since {obstacle}")
    return obstacle is None


def capture_cuda_graph(run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    graph = torch.cuda.CUDAGraph()
    # Other threads may pin memory meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = run()
    return outputs, graph.replay


class CapturedSteps:
    def __init__(self, capture: Capture = capture_cuda_graph) -> None:
        self._capture = capture
        self._calls: Counter[Hashable] = Counter()
        self._captured: dict[Hashable, _CapturedStep] = {}

    def run(
        self, kind: Hashable, step: Step, inputs: Any, numbers: Mapping[str, float] | None = None
    ) -> Any:
        """What `step(inputs, numbers)` returns: nested containers of tensors.

        kind: steps of a kind launch the same operators on tensors of the same shapes; `numbers` are
            all that may differ between them on the host
        """
        numbers = numbers or {}
        self._calls[kind] += 1
        if self._calls[kind] <= WARM_UP:
            return _beside_the_default_stream(lambda: step(inputs, _as_tensors(inputs, numbers)))
        if kind not in self._captured:
            self._captured[kind] = _CapturedStep(self._capture, step, inputs, numbers)
        return self._captured[kind].replay(inputs, numbers)


class _CapturedStep:
    def __init__(
        self, capture: Capture, step: Step, inputs: Any, numbers: Mapping[str, float]
    ) -> None:
        leaves, structure = tree_flatten(inputs)
        self._inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._numbers = _as_tensors(inputs, numbers)

        def run() -> tuple[list[Tensor], list[Any], Any]:
            results, structure_of_results = tree_flatten(
                step(tree_unflatten(self._inputs, structure), self._numbers)
            )
            tensors = [each for each in results if isinstance(each, Tensor)]
            return _packed(tensors), results, structure_of_results

        with holding_cached_tensors() as self._held:
            (self._packed, self._results, self._structure), self._replay = capture(run)

    def replay(self, inputs: Any, numbers: Mapping[str, float]) -> Any:
        for own, given in zip(self._inputs, tree_flatten(inputs)[0], strict=True):
            if isinstance(own, Tensor):
                if own.shape != given.shape:
                    raise ValueError(f"captured with {tuple(own.shape)}, not {tuple(given.shape)}")
                own.copy_(given, non_blocking=True)
        for name, number in numbers.items():
            self._numbers[name].fill_(number)
        self._replay()
        copies = iter(_unpacked([each.clone() for each in self._packed], self._results))
        filled = [next(copies) if isinstance(each, Tensor) else each for each in self._results]
        return tree_unflatten(filled, self._structure)


def _as_tensors(inputs: Any, numbers: Mapping[str, float]) -> dict[str, Tensor]:
    """On the device of the inputs; fused optimizers read rates in float32."""
    device = next(leaf.device for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor))
    return {k: torch.full((), n, dtype=torch.float32, device=device) for k, n in numbers.items()}


def _packed(tensors: list[Tensor]) -> list[Tensor]:
    """One tensor for each dtype, so that copying many small results takes a launch."""
    dtypes = list(dict.fromkeys(each.dtype for each in tensors))
    return [torch.cat([_in_memory(t) for t in tensors if t.dtype == dtype]) for dtype in dtypes]


def _in_memory(tensor: Tensor) -> Tensor:
    """Its numbers in the order of its memory, which may be channels last."""
    return (tensor.permute(0, 2, 3, 1) if _is_channels_last(tensor) else tensor).flatten()


def _unpacked(packed: list[Tensor], results: list[Any]) -> list[Tensor]:
    """The inverse, in the order of `results`."""
    tensors = [each for each in results if isinstance(each, Tensor)]
    parts = {
        each.dtype: iter(each.split([t.numel() for t in tensors if t.dtype == each.dtype]))
        for each in packed
    }
    return [_in_shape(next(parts[each.dtype]), each) for each in tensors]


def _in_shape(numbers: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_in_memory(like)`."""
    if _is_channels_last(like):
        return numbers.view(like.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
    return numbers.view(like.shape)


def _is_channels_last(tensor: Tensor) -> bool:
    is_channels_last = tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.ndim == 4 and is_channels_last and not tensor.is_contiguous()


def _beside_the_default_stream(run: Callable[[], Any]) -> Any:
    """As torch asks for before a capture, so that libraries set themselves up for other streams."""
    if not torch.cuda.is_available():
        return run()
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        outputs = run()
    current.wait_stream(stream)
    return outputs
