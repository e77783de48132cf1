"""A folder of config files, one of which is complete."""

from pathlib import Path

import pytest

from ganscale.config import resolve
from ganscale.errors import UserError

BASE = """
data: {path: data/x, resolution: 8}
generator: {target: mlp, options: {width: 8}}
critic: {target: mlp}
objective: {loss: {name: wgan}, penalties: {wgan_gp: {weight: 10}}, n_critic: 5}
optimizer: {critic: {learning_rate: 1e-4, betas: [0, 0.9]}, generator: {learning_rate: 2e-4}}
training: {total_images: 50k}
"""


class ConfigFolder:
    """A folder of config files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.base = self.write("base.yaml", BASE)

    def write(self, name: str, text: str) -> str:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    def mistake(self, text: str | None, *overrides: str) -> str:
        """The sentence about a mistake in `text`, which comes after a good file."""
        files = [self.base] if text is None else [self.base, self.write("mine.yaml", text)]
        with pytest.raises(UserError) as raised:
            resolve([*files, *overrides])
        sentence = str(raised.value)
        assert "\n" not in sentence
        return sentence
