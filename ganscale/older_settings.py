"""Settings of older versions, as run folders still hold them, and what stands for them now."""

from typing import Any

import yaml

REPLACED = {
    "training.schedule": "learning rates have schedules of their own now, such as "
    "`optimizer.critic.learning_rate={from: 2e-4, to: 0, shape: linear}`",
    "training.warmup_images": "warm-ups belong to the schedules of learning rates now, such as "
    "`optimizer.critic.learning_rate={from: 2e-4, to: 0, warmup_images: 10k}`",
}
"""By key: how to write it now."""


def take_older(config: yaml.MappingNode) -> dict[str, str]:
    """Removes replaced settings from a run folder's config; returns them by key, {} unless they
    are valid."""
    for section, value in config.value:
        if section.value != "training" or not isinstance(value, yaml.MappingNode):
            continue
        older = {
            f"training.{key.value}": each.value
            for key, each in value.value
            if f"training.{key.value}" in REPLACED
        }
        is_shape = older.get("training.schedule", "constant") in ("constant", "linear", "cosine")
        if is_shape and str(older.get("training.warmup_images", 0)).isdecimal():
            value.value = [
                pair for pair in value.value if f"training.{pair[0].value}" not in REPLACED
            ]
            return older
    return {}


def add_older(older: dict[str, str], settings: dict[str, Any]) -> None:
    """Writes what `take_older` returned as settings of today."""
    shape = older.get("training.schedule", "constant")
    warmup_images = int(older.get("training.warmup_images", 0))
    for optimizer in settings.get("optimizer", {}).values():
        rate = optimizer.get("learning_rate")
        if shape != "constant":  # over the images that are left after the warm-up
            schedule = {"from": rate, "to": 0.0, "shape": shape, "warmup_images": warmup_images}
            optimizer["learning_rate"] = schedule
        elif warmup_images > 0:
            schedule = {"from": 0.0, "to": rate, "over_images": warmup_images, "shape": "linear"}
            optimizer["learning_rate"] = schedule
