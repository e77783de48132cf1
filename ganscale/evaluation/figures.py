"""The figures of sample quality: which there are, what they are called, what they depend on."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ganscale.errors import UserError
from ganscale.importing import nearest

IDENTITY = "eval/identity"
"""In a row, a few digits for all that its figures depend on: equal ones may be compared."""

INCEPTION = "inception"
STATISTICS_SUFFIX = ".npz"


@dataclass(frozen=True)
class Metric:
    """needs: "moments" of the features; all "features"; or "classes", that is, a classifier"""

    title: str
    is_lower_better: bool
    needs: str


METRICS = {
    "fd": Metric("Fréchet distance", True, "moments"),
    "fd64": Metric("Fréchet distance on 64 components", True, "moments"),
    "kid": Metric("kernel distance", True, "features"),
    "kid_subsets": Metric("kernel distance, mean over subsets", True, "features"),
    "precision": Metric("precision", False, "features"),
    "recall": Metric("recall", False, "features"),
    "density": Metric("density", False, "features"),
    "coverage": Metric("coverage", False, "features"),
    "is": Metric("Inception Score", False, "classes"),
    "modes": Metric("modes covered", False, "classes"),
    "class_kl": Metric("KL to the reference's classes", True, "classes"),
}


@dataclass(frozen=True)
class Identity:
    """What a figure depends on besides the generator. Figures that differ in it are not comparable.

    checksum: SHA-256 of the feature network's weights
    reference: the data set's fingerprint and how it was read, or a file's checksum
    reference_images: 0 if a file of statistics does not say
    truncation: psi of the generator; 1 means none, and is neither shown nor part of the digest
    classes: how a conditional generator's classes were chosen; "" without classes, as above
    """

    network: str
    checksum: str
    resize: str
    reference: str
    reference_images: int
    samples: int
    truncation: float = 1.0
    classes: str = ""

    def row(self) -> dict[str, str | int | float]:
        """By the names of a row."""
        fields = {f"eval/{name}": value for name, value in self._shown().items()}
        return fields | {IDENTITY: self.digest()}

    def digest(self) -> str:
        """Eight hexadecimal digits."""
        return hashlib.sha256(repr((*self._shown().values(),)).encode()).hexdigest()[:8]

    def _shown(self) -> dict[str, str | int | float]:
        is_shown = {"truncation": self.truncation != 1, "classes": self.classes != ""}
        return {name: value for name, value in asdict(self).items() if is_shown.get(name, True)}

    def differences(self, other: "Identity") -> list[str]:
        """What differs, each as "name: this, that"."""
        mine, theirs = asdict(self), asdict(other)
        return [
            f"{name.replace('_', ' ')}: {mine[name]}, {theirs[name]}"
            for name in mine
            if mine[name] != theirs[name]
        ]


@dataclass(frozen=True)
class Figures:
    """The result of one evaluation. values: by the names of a row"""

    values: dict[str, float]
    identity: Identity
    seconds: float

    def row(self) -> dict[str, float | str | int]:
        return {**self.values, **self.identity.row(), "eval/seconds": round(self.seconds, 3)}


def figure_name(metric: str, network: str) -> str:
    """A figure's name in a row. Only those of the FID paper's Inception have the published names,
    `eval/fid` and so on, since a distance from another network is another metric."""
    if network == INCEPTION:
        return "eval/" + metric.replace("fd", "fid")
    return f"eval/{metric}_{network.rpartition(':')[2]}"


def is_figure(name: str) -> bool:
    """Whether a name of a row is that of a figure."""
    return _metric_of(name) is not None


def is_lower_better(name: str) -> bool | None:
    """Whether lower values of the figure with this row name are better; None if it is not one."""
    metric = _metric_of(name)
    return None if metric is None else METRICS[metric].is_lower_better


def title_of(name: str) -> str:
    """A figure for people by its name in a row, such as "recall (dinov2)", or that of which it is
    the deviation; "" if it is neither."""
    figure = re.sub(r"_std(?=_|$)", "", name, count=1)
    if (metric := _metric_of(figure)) is None:
        return ""
    title = METRICS[metric].title
    if figure == figure_name(metric, INCEPTION):
        return title.replace("Fréchet distance", "FID")
    return f"{title} ({figure.removeprefix(f'eval/{metric}_')})"


def _metric_of(name: str) -> str | None:
    if re.search(r"_std(_|$)", name):
        return None
    stem = re.sub(r"^eval/fid", "eval/fd", name)
    known = sorted(METRICS, key=len, reverse=True)  # kid_subsets before kid
    return next((m for m in known if re.match(rf"eval/{m}(_|$)", stem)), None)


def check_metrics(metrics: Sequence[str], network: str, reference: str) -> list[str]:
    """`metrics` by their keys in METRICS, `fid` as `fd`. Raises UserError for an unknown one, and
    for one that this network or reference cannot give."""
    if not metrics:
        raise UserError("evaluation.metrics is empty: name some, or set evaluation.every_images=0")
    for metric in metrics:
        if metric == "fid" and network != INCEPTION:
            raise UserError(
                f"`fid` is the Fréchet distance of the published Inception's features: with the "
                f"network {network}, ask for `fd`"
            )
    keys = ["fd" if metric == "fid" else metric for metric in metrics]
    for key in keys:
        if key not in METRICS:
            hint = nearest(key, METRICS) or f"; choose from {', '.join(METRICS)}"
            raise UserError(f"evaluation.metrics: there is no `{key}`{hint}")
        is_file = reference.endswith(STATISTICS_SUFFIX)
        if is_file and METRICS[key].needs != "moments" and key not in ("is", "modes"):
            raise UserError(
                f"`{key}` needs the images of the reference, but {reference} has only their mean "
                "and covariance: give a data set as evaluation.reference"
            )
    return list(dict.fromkeys(keys))
