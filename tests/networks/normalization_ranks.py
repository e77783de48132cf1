"""What each of the two ranks of test_normalization.py computes."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ganscale.networks import GlobalBatchNorm, ResNetGenerator

WORLD_SIZE = 2
GLOBAL_BATCH = 8


def make_generator() -> ResNetGenerator:
    """A conditional generator, so that plain and conditional normalization are both in it."""
    torch.manual_seed(0)
    generator = ResNetGenerator(6, (3, 16, 16), num_classes=3, width=4).double()
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return generator


def large_mean_images() -> torch.Tensor:
    """float32 images whose channels have a mean 10,000 times their deviation."""
    torch.manual_seed(2)
    return 1000 + 0.1 * torch.randn(GLOBAL_BATCH, 3, 16, 16)


def bfloat16_images_and_gradients() -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients' means are five times their deviations."""
    torch.manual_seed(4)
    images, gradients = torch.randn(2, GLOBAL_BATCH, 3, 16, 16)
    return images.bfloat16(), (gradients + 5).bfloat16()


def use_twice(generator: torch.nn.Module, own: slice) -> dict[str, torch.Tensor]:
    """Two training forwards, one backward, and an evaluation, of the global batch's part `own`."""
    torch.manual_seed(1)
    latents = torch.randn(2, GLOBAL_BATCH, 6, dtype=torch.float64)[:, own].requires_grad_()
    labels = torch.randint(3, (2, GLOBAL_BATCH))[:, own]
    targets = torch.randn(GLOBAL_BATCH, 3, 16, 16, dtype=torch.float64)[own]
    first, second = generator(latents[0], labels[0]), generator(latents[1], labels[1])
    ((first - targets).square().mean() + (second * first * targets).mean()).backward()
    bare = generator.module if isinstance(generator, DistributedDataParallel) else generator
    evaluated = bare.eval()(latents[0], labels[0])
    assert latents.grad is not None
    return {
        "images": torch.stack([first, second, evaluated], dim=1).detach(),
        "latent gradients": latents.grad.transpose(0, 1),
        **{f"gradient of {n}": p.grad for n, p in bare.named_parameters() if p.grad is not None},
        **{f"buffer {name}": buffer for name, buffer in bare.named_buffers()},
    }


def run(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    local_batch = GLOBAL_BATCH // WORLD_SIZE
    own = slice(rank * local_batch, (rank + 1) * local_batch)
    wrapped = DistributedDataParallel(make_generator(), broadcast_buffers=False)
    results = use_twice(wrapped, own)

    norm = GlobalBatchNorm(3)
    results["large mean"] = norm(large_mean_images()[own]).detach()
    results["large mean, running variance"] = norm.running_var.clone()
    torch.manual_seed(3)
    halves = torch.randn(GLOBAL_BATCH, 3, 16, 16).bfloat16()
    results["bfloat16"] = norm(halves[own]).detach()
    for name, layout in (
        ("bfloat16 gradients", torch.contiguous_format),
        ("channels last gradients", torch.channels_last),
    ):
        images, gradients = (
            each[own].contiguous(memory_format=layout) for each in bfloat16_images_and_gradients()
        )
        images.requires_grad_()
        GlobalBatchNorm(3)(images).backward(gradients)
        assert images.grad is not None
        assert images.grad.is_contiguous(memory_format=layout)
        results[name] = images.grad
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()
