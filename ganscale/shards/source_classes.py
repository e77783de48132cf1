"""The classes of the images of a folder or archive: folders, StyleGAN's dataset.json, or a label
beside each image.

dataset.json is that of dataset_tool.py in github.com/NVlabs/stylegan3.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ganscale.data.labels import label_of
from ganscale.errors import UserError
from ganscale.shards.class_labels import Labels, MemberChoice, find_labels, number_labels

_DATASET_JSON = "dataset.json"
_SPLIT = re.compile(
    r"(train(ing)?|val(id|idation)?|test(ing)?|dev|eval)[-_ ]?(images?|set|data|\d+|[AB])?",
    re.IGNORECASE,
)
"""Names of parts of a data set, such as train, val2017, test_images and CycleGAN's trainA."""

_NUMBERED = re.compile(r"(?:^|/)\d{5}/(img\d{8}|\d{9})\.\w+$")
"""How StyleGAN and img2dataset number images: 00012/img00012345.png, 00012/000120345.jpg."""

_MAX_NAMED = 5


class Classes(NamedTuple):
    """The number of each image's class, -1 for all without; their names, or empty; notes for the
    user."""

    numbers: list[int]
    names: list[str]
    notes: list[str]


def find_classes(
    source: str,
    names: list[str],
    others: list[str],
    read: Callable[[str], bytes],
    choice: MemberChoice,
    splits: Sequence[str] = (),
) -> Classes:
    """The classes of the images `names`; `others` are the other files, which `read` reads.

    choice.classes: folder: the class of an image is the first folder of its name in which the
        images differ, so `photos/cat/1.jpg` and `photos/dog/2.jpg` have the classes cat and dog;
        json, cls or txt: the file of this extension beside each image, for json first a
        dataset.json; none; "": a dataset.json or .cls files, if there are any

    Raises UserError for images without a class, and where it is not clear what the classes are.
    """
    if choice.classes == "folder":
        return _folder_classes(source, names, others, splits)
    labels, notes = None, []
    if choice.classes in ("", "json"):
        labels, notes = _stylegan_labels(source, names, others, read, splits)
    if labels is None:
        labels = _labels_beside(names, others, read, choice)
    if labels is None:
        notes += _folder_notes(names, splits)
        beside = [file for file in others if file.rpartition("/")[2] != _DATASET_JSON]
        if not choice.classes and any(file.endswith(".json") for file in beside):
            notes.append("if .json files hold classes, --classes json takes them")
        return Classes([-1] * len(names), [], notes)
    if labels.bad:
        more = f" (and {len(labels.bad) - 1:,} more)" if len(labels.bad) > 1 else ""
        raise UserError(f"{source}: {labels.bad[0][1]}{more}")
    return Classes(labels.numbers, labels.names, notes)


def _stylegan_labels(
    source: str,
    names: list[str],
    others: list[str],
    read: Callable[[str], bytes],
    splits: Sequence[str],
) -> tuple[Labels | None, list[str]]:
    """The labels in dataset.json, with notes; None without the file, and where it has none."""
    ends = tuple(f"{split}/" for split in splits) or ("",)
    files = [file for file in others if file.rpartition("/")[2] == _DATASET_JSON]
    files = [
        file
        for file in files
        if file.startswith(ends) or any(end.startswith(_folder(file)) for end in ends)
    ]
    if len(files) > 1:
        folder = max(map(_folder, files)).rstrip("/")
        raise UserError(f"{source} has several {_DATASET_JSON}: choose with `--split {folder}`")
    if not files:
        return None, []
    (place,) = files
    try:
        content = json.loads(read(place))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: {place} is not JSON: {error}") from error
    if not isinstance(content, dict) or "labels" not in content:
        return None, []
    entries = content["labels"]
    unlabelled = None, [f"{place} has no labels, so the images are stored without classes"]
    if entries is None:
        return unlabelled
    try:
        values = {
            # dataset_tool.py writes backslashes on Windows.
            _folder(place) + name.replace("\\", "/").removeprefix("./"): value
            for name, value in entries
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f'{source}: "labels" in {place} are not pairs of a name and a class, as StyleGAN '
            "writes them; `--classes none` ignores them"
        ) from error
    if all(value is None for value in values.values()):
        return unlabelled
    labels = [_label(values.get(name)) for name in names]
    unused = values.keys() - set(names) if not splits else ()
    notes = [f"labels of {place} without an image: {len(unused):,}"] if unused else []
    return number_labels(names, labels), notes


def _label(value: Any) -> int | str | ValueError | None:
    try:
        return label_of(value)
    except ValueError as error:
        return error


def _labels_beside(
    names: list[str], others: list[str], read: Callable[[str], bytes], choice: MemberChoice
) -> Labels | None:
    """The labels in files named like the images; None if none are chosen and there are none."""
    if choice.classes == "none":
        return None
    wanted = choice.label_extension or "cls"
    parts = [(file, *file.rpartition(".")[::2]) for file in others]
    files = {stem: file for file, stem, extension in parts if extension.lower() == wanted}
    if not (choice.label_extension or files):
        return None
    samples = []
    for name in names:
        stem = name[: -len(choice.image) - 1] if choice.image else name.rpartition(".")[0]
        samples.append((stem, {wanted: read(files[stem])} if stem in files else {}))
    return find_labels(samples, choice._replace(classes=wanted))


def _folder_classes(
    source: str, names: list[str], others: list[str], splits: Sequence[str]
) -> Classes:
    if all(_NUMBERED.search(name) for name in names):
        raise UserError(
            f"{source}: folders such as that of {names[0]} only number the images, so they are not "
            "classes; `--classes json` takes classes from dataset.json, or from JSON beside images"
        )
    folders = [_within(name, splits).split("/")[:-1] for name in names]
    depth = len(os.path.commonprefix(folders))  # noqa: RUF071 (compares folders, not characters)
    for name, parts in zip(names, folders, strict=True):
        if len(parts) <= depth:
            raise UserError(
                f"{source}: the image {name} is not in a class folder; with `--classes folder`, "
                "each class needs its own folder"
            )
    class_names = sorted({parts[depth] for parts in folders})
    if found := _splits_among(class_names):
        options = ["--split " + "/".join((*folders[0][:depth], name)) for name in found]
        raise UserError(
            f"{source}: the folders {', '.join(found)} are splits, not classes: choose with "
            f"`{options[0]}`, or take all with `{' '.join(options)}`"
        )
    number_of = {name: number for number, name in enumerate(class_names)}
    numbers = [number_of[parts[depth]] for parts in folders]
    notes = []
    if any(file.rpartition("/")[2] == _DATASET_JSON for file in others):
        notes.append(f"{_DATASET_JSON} is not used; --classes json takes the classes from it")
    beside = [_within(file, splits).split("/")[:-1] for file in others]
    prefix = folders[0][:depth]
    found = {parts[depth] for parts in beside if parts[:depth] == prefix and len(parts) > depth}
    if empty := sorted(found - set(class_names)):
        notes.append(f"folders without images, which are not classes: {', '.join(empty)}")
    return Classes(numbers, class_names, notes)


def _folder_notes(names: list[str], splits: Sequence[str]) -> Iterator[str]:
    """Notes for images that are stored without classes, but are in different folders."""
    folders = [_within(name, splits).split("/")[:-1] for name in names]
    depth = len(os.path.commonprefix(folders))  # noqa: RUF071 (compares folders, not characters)
    found = sorted({parts[depth] for parts in folders if len(parts) > depth})
    if split_names := _splits_among(found):
        yield f"images of {', '.join(split_names)} are stored together; choose one with --split"
    elif len(found) > 1 and not all(_NUMBERED.search(name) for name in names):
        some = ", ".join(found[:_MAX_NAMED]) + (", ..." if len(found) > _MAX_NAMED else "")
        yield f"images are stored without classes; with --classes folder, these would be {some}"


def _splits_among(folders: list[str]) -> list[str]:
    """The folders named like parts of a data set, if there are several; one may be a class."""
    found = [name for name in folders if _SPLIT.fullmatch(name)]
    return found if len(found) > 1 else []


def _within(name: str, splits: Sequence[str]) -> str:
    """The name of a file within its split."""
    split = next((split for split in splits if name.startswith(f"{split}/")), None)
    return name if split is None else name[len(split) + 1 :]


def _folder(name: str) -> str:
    """The folder of a file, with a slash at its end; "" for none."""
    head, slash, _ = name.rpartition("/")
    return head + slash
