"""The networks of a plan: parameters, checkpoint files and device memory.

Networks are built as in training, but on torch's meta device, so parameters have shapes and types
without storage. A network that cannot be built there is built on the CPU.
"""

import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ganscale.runtime import weights_dtype
from ganscale.schema import Config
from ganscale.training.ema import ema_copy
from ganscale.training.network_setup import build_unchecked_networks
from ganscale.training.optimizers import build_optimizer
from ganscale.training.state import Files, checkpoint_files


def planned_networks(config: Config, num_classes: int) -> tuple[nn.Module, nn.Module]:
    """(generator, critic) in the run's precision. Raises UserError as training does."""
    try:
        with torch.device("meta"):
            generator, critic = build_unchecked_networks(config, num_classes)
    except (NotImplementedError, RuntimeError):  # a constructor that reads its weights
        generator, critic = build_unchecked_networks(config, num_classes)
    dtype = weights_dtype(config.training.precision)
    return generator.to(dtype), critic.to(dtype)


def planned_files(config: Config, generator: nn.Module, critic: nn.Module) -> Files:
    """The files of a checkpoint, with the shapes and types that tensors have after a step."""
    return checkpoint_files(
        generator,
        critic,
        ema_copy(generator),
        build_optimizer(trainable(generator), config.optimizer.generator).tensors(),
        build_optimizer(trainable(critic), config.optimizer.critic).tensors(),
    )


def safetensors_bytes(tensors: Mapping[str, Tensor]) -> int:
    """The size of a file with `tensors`: 8 bytes, a JSON header padded to a multiple of 8, and the
    elements (https://huggingface.co/docs/safetensors)."""
    header: dict[str, dict] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": _dtype_name(tensors[name].dtype),
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    header_bytes = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-header_bytes // 8) * 8 + end


def _dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> BF16, torch.uint8 -> U8"""
    name = str(dtype).removeprefix("torch.").replace("float", "F")
    return name.replace("uint", "U").replace("int", "I").upper()


def trainable(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def device_bytes(files: Files, generator: nn.Module, critic: nn.Module) -> int:
    """Everything in a checkpoint, and the gradients of both networks."""
    stored = sum(tensor.nbytes for file in files.values() for tensor in file.values())
    return stored + sum(p.nbytes for network in (generator, critic) for p in trainable(network))
