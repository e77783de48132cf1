"""What a training cycle costs against hand-written loops of the same mathematics.

    python -m benchmarks.step [--quick] [--json FILE]

One cycle is `n_critic` critic steps and a generator step on synthetic images: no data, no logging.
The rivals train copies of the same networks with the same loss, penalty, optimizer and batch:

- `plain loop`: well written. Fakes without a graph, one forward each for real, fake and
  interpolates, one backward, critic frozen in the generator step.
- `usual loop`: as most people write it. Three forwards, three backwards, and the critic's gradients
  computed in the generator step.
"""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.report import Row, arguments, report
from benchmarks.timing import interleaved, speedup
from ganscale.config import resolve
from ganscale.data.loader import Batch
from ganscale.objectives.losses import build_loss
from ganscale.randomness import normal, uniform
from ganscale.runtime import Runtime
from ganscale.schema import Config
from ganscale.training.optimizers import build_optimizer
from ganscale.training.trainer import Cycle
