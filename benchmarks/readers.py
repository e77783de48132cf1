"""The contestants of `benchmarks.data`: each an endless stream of batches on one core.

A reader is a function that takes a `Case` and returns an iterator of batches (arrays or tensors
whose first dimension counts images). All but webdataset's default decode with our own
`decode_into`, the fastest here, and yield uint8, so the comparison is of everything else. Rivals
have one worker process, as their users would give them for a core; ours has one thread.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ganscale.data.images.decoding import decode_into
from ganscale.data.loader import Loader
from ganscale.data.manifest import Manifest
from ganscale.runtime import keep_freed_memory
from ganscale.schema import DataConfig

BATCH = 64


@dataclass(frozen=True)
class Case:
    """root: has a folder per format with the images; extension: of the image files"""

    name: str
    root: Path
    extension: str
    resolution: int
    is_resized: bool


def _tensor(data: bytes, resolution: int) -> torch.Tensor:
    """(resolution, resolution, 3) uint8."""
    pixels = torch.empty((resolution, resolution, 3), dtype=torch.uint8)
    decode_into(data, pixels.numpy())
    return pixels


def ganscale(case: Case) -> Iterator[Any]:
    config = DataConfig(
        path=str(case.root / "shards"), resolution=case.resolution, channels=3, workers=1
    )
    keep_freed_memory()  # as a run does
    loader = Loader(
        Manifest.load(case.root / "shards"),
        config,
        seed=0,
        global_batch_size=BATCH,
        rank=0,
        world_size=1,
        position=0,
    )
    return (batch.images for batch in loader)


def decoder_alone(case: Case) -> Iterator[Any]:
    """Every image decoded from memory into one batch, which is not passed on."""
    files = [path.read_bytes() for path in sorted((case.root / "loose").iterdir())]
    batch = np.empty((BATCH, case.resolution, case.resolution, 3), np.uint8)
    for start in count(step=BATCH):
        for row in range(BATCH):
            decode_into(files[(start + row) % len(files)], batch[row])
        yield batch


def webdataset_default(case: Case) -> Iterator[Any]:
    """As in its documentation: shuffle, decode to float32, tuple, batched."""
    if not case.is_resized:
        return _webdataset(case, lambda dataset: dataset.decode("torchrgb"))
    resized = partial(_resized_by_pillow, resolution=case.resolution)
    return _webdataset(
        case, lambda dataset: dataset.decode("pil").map_dict(**{case.extension: resized})
    )


def _resized_by_pillow(image: Any, resolution: int) -> torch.Tensor:
    """(3, resolution, resolution) float32 in [0, 1], as torchvision's Resize and ToTensor do."""
    from PIL.Image import Resampling

    small = image.convert("RGB").resize((resolution, resolution), Resampling.LANCZOS)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous().float().div(255)


def webdataset_fast(case: Case) -> Iterator[Any]:
    """The same pipeline with our decoder."""
    image = partial(_tensor, resolution=case.resolution)
    return _webdataset(
        case, lambda dataset: dataset.map_dict(**{case.extension: image, "cls": int})
    )


def _webdataset(case: Case, decoded: Callable[[Any], Any]) -> Iterator[Any]:
    from webdataset.compat import WebDataset, WebLoader

    shards = sorted(str(path) for path in (case.root / "shards").glob("*.tar"))
    dataset = WebDataset(shards, resampled=True, shardshuffle=False).shuffle(1000)
    dataset = decoded(dataset).to_tuple(case.extension, "cls").batched(BATCH)
    return (batch[0] for batch in WebLoader(dataset, num_workers=1, batch_size=None))


class LooseFiles(Dataset):
    """Files in a folder, with labels in their names."""

    def __init__(self, case: Case) -> None:
        self._paths = sorted(map(str, (case.root / "loose").iterdir()))
        self._resolution = case.resolution

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path = Path(self._paths[index])
        label = int(path.stem.rpartition("_")[2])
        return _tensor(path.read_bytes(), self._resolution), label


def loose_files(case: Case) -> Iterator[Any]:
    return _epochs(DataLoader(LooseFiles(case), BATCH, shuffle=True, **_ONE_WORKER))


def litdata(case: Case) -> Iterator[Any]:
    import litdata  # pyright: ignore[reportMissingImports]

    dataset = litdata.StreamingDataset(
        str(case.root / "litdata"),
        shuffle=True,
        drop_last=False,
        transform=partial(_tensors, resolution=case.resolution),
    )
    return _epochs(litdata.StreamingDataLoader(dataset, batch_size=BATCH, **_ONE_WORKER))


def mosaic(case: Case) -> Iterator[Any]:
    import streaming  # pyright: ignore[reportMissingImports]

    class Images(streaming.StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return _tensors(super().__getitem__(at), case.resolution)

    dataset = Images(local=str(case.root / "mosaic"), shuffle=True, batch_size=BATCH)
    return _epochs(DataLoader(dataset, BATCH, **_ONE_WORKER))


_ONE_WORKER: Any = {"num_workers": 1, "persistent_workers": True}


def _tensors(sample: dict[str, Any], resolution: int) -> tuple[torch.Tensor, int]:
    return _tensor(bytes(sample["image"]), resolution), sample["label"]


def _epochs(loader: Any) -> Iterator[Any]:
    while True:
        for images, _ in loader:
            yield images


OURS, LIMIT = "ganscale", "decoder alone"
READERS: dict[str, tuple[Callable[[Case], Iterator[Any]], str]] = {
    OURS: (ganscale, "shards"),
    LIMIT: (decoder_alone, "loose"),
    "webdataset default": (webdataset_default, "shards"),
    "webdataset + our decoder": (webdataset_fast, "shards"),
    "loose files + our decoder": (loose_files, "loose"),
    "litdata + our decoder": (litdata, "litdata"),
    "mosaicml-streaming + our decoder": (mosaic, "mosaic"),
}
"""Name in the table -> (reader, the format that it reads)."""
