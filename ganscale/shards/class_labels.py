"""The classes of samples, from the label beside each image: numbers as they are, names numbered."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from ganscale.data.labels import CLASS_LIMIT, LABEL_EXTENSIONS, NotJsonError, parse_label

_MAX_NAMED = 10


class MemberChoice(NamedTuple):
    """Which members of a sample are used.

    image: the extension of its image; "": the only image that it has
    classes: the extension of its class, or none; "": the first of LABEL_EXTENSIONS with classes,
        and json with a `class_key`
    class_key: where JSON has the class; "": the usual keys
    """

    image: str = ""
    classes: str = ""
    class_key: str = ""

    @property
    def label_extension(self) -> str:
        return self.classes or ("json" if self.class_key else "")


USUAL_MEMBERS = MemberChoice()


class Labels(NamedTuple):
    """The classes of samples.

    numbers: one per sample; -1 for a bad one, and for all where there are no classes
    names: sorted, one per number, where labels are names; else empty
    bad: (key, reason) of the samples whose class is missing or cannot be used
    json_keys: what JSON of a sample has, where no class was found
    """

    numbers: list[int]
    names: list[str]
    bad: list[tuple[str, str]]
    json_keys: tuple[str, ...] = ()


def find_labels(
    samples: Sequence[tuple[str, Mapping[str, bytes]]], choice: MemberChoice = USUAL_MEMBERS
) -> Labels:
    """The class of each of `samples`, which are a key and the contents of label members by
    extension."""
    keys = [key for key, _ in samples]
    json_keys: tuple[str, ...] = ()
    chosen = choice.label_extension
    for extension in (chosen,) if chosen else LABEL_EXTENSIONS:
        is_there = chosen or any(extension in members for _, members in samples)
        if extension == "none" or not is_there:
            continue
        labels: list[int | str | ValueError | None] = []
        for _, members in samples:
            try:
                labels.append(parse_label(members.get(extension), extension, choice.class_key))
            except ValueError as error:
                labels.append(error)
        # Most texts are captions, of which a few may be numbers; most JSON has no class.
        numbers = sum(isinstance(label, int) for label in labels)
        is_caption = extension == "txt" and 2 * numbers <= len(labels)
        is_other = extension == "json" and all(
            label is None or isinstance(label, NotJsonError) for label in labels
        )
        if chosen or not (is_caption or is_other):
            return number_labels(keys, labels, extension)
        if extension == "json":
            json_keys = _json_keys(samples)
    return Labels([-1] * len(samples), [], [], json_keys)


def _json_keys(samples: Sequence[tuple[str, Mapping[str, bytes]]]) -> tuple[str, ...]:
    with suppress(ValueError, RecursionError):
        content = json.loads(next(members["json"] for _, members in samples if "json" in members))
        return tuple(content)[:_MAX_NAMED] if isinstance(content, dict) else ()
    return ()


def number_labels(
    keys: Sequence[str], labels: Sequence[int | str | ValueError | None], extension: str = ""
) -> Labels:
    """The classes of samples with these labels, where None is a missing one and an error one that
    cannot be used. They come from members with `extension`, or from a dataset.json."""
    has_numbers = any(isinstance(label, int) for label in labels)
    others = ", but others have" if any(label is not None for label in labels) else ""
    found = {label for label in labels if isinstance(label, str)}
    names = [] if has_numbers else sorted(found)  # among numbers, a name is a mistake
    number_of = {name: number for number, name in enumerate(names)}
    numbers: list[int] = []
    bad: list[tuple[str, str]] = []
    for key, label in zip(keys, labels, strict=True):
        number = number_of.get(label, -1) if isinstance(label, str) else label
        if isinstance(number, int) and 0 <= number < CLASS_LIMIT:
            numbers.append(number)
            continue
        numbers.append(-1)
        place = f"'{key}.{extension}'" if extension else "dataset.json"
        problem = f"the label of sample '{key}' in {place} "
        if label is None:
            problem = f"sample '{key}' has no label{others} ({extension or 'dataset.json'})"
        elif isinstance(label, str):
            problem += f"is {label[:40]!r}, but others are numbers"
        elif isinstance(label, int):
            problem += f"is {label}, not a class"
        else:
            problem += str(label)
        bad.append((key, f"{problem}; `--classes none` ignores all labels"))
    return Labels(numbers, names, bad)
