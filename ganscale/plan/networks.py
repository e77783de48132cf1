"""What a config's networks weigh: parameters, checkpoint files, device memory, collectives.

The networks are built without storage (on torch's meta device), as training builds them: their
parameters have shapes and types only. One that cannot be built so is built on the CPU.
"""

import dataclasses
import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ganscale.networks.normalization import GlobalBatchNorm
from ganscale.objectives.objective import Objective
from ganscale.runtime import weights_dtype
from ganscale.schema import Config, OptimizerConfig
from ganscale.training.cycle import makes_fakes_together
from ganscale.training.ema import ema_copy
from ganscale.training.network_setup import build_unchecked_networks, sample_shape
from ganscale.training.optimizers import build_optimizer, optimizer_tensors

# DistributedDataParallel's own: averaging starts as soon as a bucket is full.
_FIRST_BUCKET_BYTES, _BUCKET_BYTES = 1 << 20, 25 << 20

Files = dict[str, dict[str, Tensor]]


def planned_networks(config: Config, num_classes: int) -> tuple[nn.Module, nn.Module]:
    """(generator, critic) in the run's precision. Raises UserError as training does."""
    try:
        with torch.device("meta"):
            generator, critic = build_unchecked_networks(config, num_classes)
    except (NotImplementedError, RuntimeError):  # a constructor that looks at its weights
        generator, critic = build_unchecked_networks(config, num_classes)
    dtype = weights_dtype(config.training.precision)
    return generator.to(dtype), critic.to(dtype)


def checkpoint_files(config: Config, generator: nn.Module, critic: nn.Module) -> Files:
    """Names, shapes and types of what a checkpoint holds: `TrainingState.files()` after a step."""
    return {
        "generator": generator.state_dict(),
        "critic": critic.state_dict(),
        "ema": ema_copy(generator).state_dict(),
        "generator_optimizer": _optimizer_tensors(generator, config.optimizer.generator),
        "critic_optimizer": _optimizer_tensors(critic, config.optimizer.critic),
    }


def _optimizer_tensors(network: nn.Module, config: OptimizerConfig) -> dict[str, Tensor]:
    """From one real step on a parameter of two elements: what has its shape is a moment."""
    tensors: dict[str, Tensor] = {}
    parameters = [p for p in network.parameters() if p.requires_grad]
    for dtype in {p.dtype for p in parameters}:
        probe = nn.Parameter(torch.zeros(2, dtype=dtype, device="cpu"))
        probe.grad = torch.zeros_like(probe)
        optimizer = build_optimizer([probe], config)
        optimizer.step()
        for name, tensor in optimizer_tensors(optimizer).items():
            for index, parameter in enumerate(parameters):
                if parameter.dtype == dtype:
                    shape = parameter.shape if tensor.shape == probe.shape else tensor.shape
                    empty = torch.empty(shape, dtype=tensor.dtype, device="meta")
                    tensors[f"{index}.{name.partition('.')[2]}"] = empty
    return tensors


def safetensors_bytes(tensors: Mapping[str, Tensor]) -> int:
    """The size of the file that holds `tensors`: 8 bytes, a JSON header filled up to a multiple of
    8, and the elements (https://huggingface.co/docs/safetensors)."""
    header: dict[str, dict] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": _TYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    described = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-described // 8) * 8 + end


_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def device_bytes(files: Files, generator: nn.Module, critic: nn.Module) -> int:
    """Weights, moments and average, as in a checkpoint, and the gradients of both networks."""
    stored = sum(tensor.nbytes for file in files.values() for tensor in file.values())
    return stored + sum(p.nbytes for network in (generator, critic) for p in trained(network))


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What a part of a cycle reduces over the ranks, in bytes and number of collectives; and what
    each rank gives to gathers, in which all ranks receive it."""

    reduced_bytes: int
    gathered_bytes: int
    collectives: int


def cycle_exchanges(
    config: Config, objective: Objective, generator: nn.Module, critic: nn.Module, ranks: int
) -> tuple[Exchange, Exchange, Exchange]:
    """(of the fakes for all critic steps, of a critic step without them, of a generator step)."""
    parts, images = config.training.accumulate, config.training.global_batch_size // ranks
    n_critic, reuses = config.objective.n_critic, config.training.reuse_fakes
    norms = [m for m in generator.modules() if isinstance(m, GlobalBatchNorm)]
    # Mean and square per channel in float64, in each forward, and their gradients in a backward.
    norm_bytes = sum(2 * 8 * norm.running_mean.numel() for norm in norms)
    dragan = objective.penalties.get("dragan")  # two float64 for the deviation of the batch
    spans = objective.loss.needs_global_batch
    forwards = (1 if reuses else 2) * parts + (parts if spans and parts > 1 else 0)
    logits = images * _logit_bytes(config, critic) if spans else 0
    is_together = makes_fakes_together(config, generator, ranks)
    messages = min(n_critic, 1 + reuses) if is_together else n_critic
    of_fakes = Exchange(n_critic * norm_bytes, 0, messages * len(norms))
    of_critic = Exchange(
        _gradient_bytes(config, critic) + (16 if dragan else 0),
        2 * logits,
        _buckets(trained(critic)) + (1 if dragan else 0) + (2 if spans else 0),
    )
    of_generator = Exchange(
        _gradient_bytes(config, generator) + forwards * norm_bytes,
        2 * logits,
        _buckets(trained(generator)) + forwards * len(norms) + (2 if spans else 0),
    )
    return of_fakes, of_critic, of_generator


def _logit_bytes(config: Config, critic: nn.Module) -> int:
    """Of one image's logits; a critic that does not run without storage is taken to give one."""
    device = next(critic.parameters()).device
    dtype = weights_dtype(config.training.precision)
    try:
        with torch.no_grad():
            logits = critic(torch.empty(2, *sample_shape(config), dtype=dtype, device=device))
        return logits[0].numel() * logits.itemsize
    except Exception:  # the user's own network, or one that wants labels
        return dtype.itemsize


def _gradient_bytes(config: Config, network: nn.Module) -> int:
    """As they travel."""
    if config.training.gradient_compression == "bfloat16":
        return sum(2 * parameter.numel() for parameter in trained(network))
    return sum(parameter.nbytes for parameter in trained(network))


def _buckets(parameters: list[nn.Parameter]) -> int:
    """How many buckets DDP makes of the gradients, which come last layer first."""
    buckets, filled, limit = 0, 0, _FIRST_BUCKET_BYTES
    for parameter in reversed(parameters):
        filled += parameter.nbytes
        if filled >= limit:
            buckets, filled, limit = buckets + 1, 0, _BUCKET_BYTES
    return buckets + (filled > 0)
