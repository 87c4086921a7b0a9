"""The weights table: every checkpoint, one entry each. Factories, docs and the command line read it.

Sources: the MMAction2 model zoo (layout "mmaction2", direct links) and the table of decisionforce/TPN (layout
"original", links to a file-sharing site behind a confirmation page). Accuracies are the ones reported there; both
projects are released under Apache-2.0. Entries of layout "tpn" were trained here and lie in this package.
"""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tpn.video import motion
from tpn.video.spec import InputSpec
from tpn.zoo.convert import Layout

HUB_NAMESPACE = "tpn-zoo"
"""Owner of the Hub repositories "{owner}/{model}.{tag}". It is asked for entries with a `converted_sha256` only, so that nobody
else can take its place; $TPN_HUB_NAMESPACE names another owner, who is trusted, and an empty one skips the Hub."""


@dataclass(frozen=True)
class Dataset:
    """A data set with its class names in training order: `names`, or the lines of `labels/{file}.txt`."""

    title: str
    file: str
    num_classes: int
    names: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        return self.names or _read_labels(self.file)


KINETICS400 = Dataset("Kinetics-400", "k400", 400)
STHV1 = Dataset("Something-Something v1", "sthv1", 174)
STHV2 = Dataset("Something-Something v2", "sthv2", 174)
MOTION = Dataset("rendered motion", "", len(motion.CLASSES), motion.CLASSES)


@dataclass(frozen=True)
class Weights:
    """One checkpoint.

    Attributes:
        model, tag: registry key and checkpoint name; `name` is both, "model.tag".
        dataset, input: classes, and frames, sampling, views of the published test protocol.
        layout: the code base that wrote the file; see `tpn.zoo.convert`.
        url: where it is; None for those in this package. manual: the link shows a page, a person has to click.
        sha256: leading hex digits of the hash of the file there, where its publisher gives them.
        converted_sha256: the whole hash of `model.safetensors` on the Hub, once published there.
        revision: branch, tag or commit of the Hub repository; None is its main branch.
        license: of the weights, as its publisher states it.
        initialised_from: what its training started from.
        reported_top1, reported_top5: accuracy in percent, as its publisher reports it; None for this project's own.
        measured_top1, measured_top5: the same, measured by this project.
        note: what the publisher says of data or protocol.
        model_args: arguments its model must be built with.
    """

    model: str
    tag: str
    dataset: Dataset
    input: InputSpec
    layout: Layout
    url: str | None
    manual: bool
    sha256: str | None
    initialised_from: str | None
    reported_top1: float | None = None
    reported_top5: float | None = None
    measured_top1: float | None = None
    measured_top5: float | None = None
    note: str = ""
    model_args: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    converted_sha256: str | None = None
    revision: str | None = None
    license: str = "apache-2.0"

    @property
    def name(self) -> str:
        return f"{self.model}.{self.tag}"

    @property
    def embedded(self) -> Path | None:
        """The file in this package, for entries that come with it."""
        return Path(str(resources.files("tpn.zoo"))) / "embedded" / f"{self.name}.safetensors" if self.url is None else None

    @property
    def repo_id(self) -> str | None:
        """The Hub repository, None if $TPN_HUB_NAMESPACE is empty."""
        namespace = os.environ.get("TPN_HUB_NAMESPACE", HUB_NAMESPACE)
        return f"{namespace}/{self.name}" if namespace else None

    @property
    def protocol(self) -> str:
        """The published test protocol in words."""
        spec = self.input
        flip = ", each also mirrored" if spec.flip else ""
        size = spec.three_crop_size if spec.num_crops == 3 else spec.crop_size
        crops = f"{spec.num_crops} crops" if spec.num_crops > 1 else "1 crop"
        return f"{spec.num_clips} clips x {crops} of {size}{flip}; mean of softmax over {spec.num_views} views"

    @property
    def source(self) -> str:
        return {"mmaction2": "MMAction2", "original": "decisionforce/TPN", "tpn": "tpn"}[self.layout]


def _mmaction2(
    model: str, tag: str, dataset: Dataset, spec: InputSpec, file: str, top1: float, top5: float, note: str, **kwargs: Any
) -> Weights:
    folder, _, date_and_hash = file.rpartition("_")
    sha256 = date_and_hash.partition("-")[2]
    url = f"https://download.openmmlab.com/mmaction/v1.0/recognition/tpn/{folder}/{file}.pth"
    return Weights(
        model, tag, dataset, spec, "mmaction2", url, False, sha256, reported_top1=top1, reported_top5=top5, note=note, **kwargs
    )


def _original(
    model: str, dataset: Dataset, spec: InputSpec, file_id: str, top1: float, note: str, tag: str = "original", **kwargs: Any
) -> Weights:
    url = f"https://drive.google.com/open?id={file_id}"
    return Weights(model, tag, dataset, spec, "original", url, True, None, "ImageNet", reported_top1=top1, note=note, **kwargs)


def _dense(num_frames: int, frame_interval: int, flip: bool = False) -> InputSpec:
    return InputSpec(num_frames, frame_interval, "dense", num_clips=10, num_crops=3, flip=flip)


_SEGMENTS = InputSpec(8, 1, "segments", num_clips=2, num_crops=3)
_STHV1 = replace(_SEGMENTS, mirrored=((2, 4), (30, 41), (52, 66)))
_STHV2 = replace(_SEGMENTS, mirrored=((86, 87), (93, 94), (166, 167)))
_IN_PLACE: Mapping[str, Any] = MappingProxyType({"shift_shortcut": True})
_LOWRES = "240x320 source videos, 19,769 validation videos"
_HIRES = "raw-resolution source videos"

_TABLE = (
    _mmaction2(
        "tpn_slowonly_r50_k400",
        "in1k",
        KINETICS400,
        _dense(8, 8),
        "tpn-slowonly_imagenet-pretrained-r50_8xb8-8x8x1-150e_kinetics400-rgb_20220913-fed3f4c1",
        76.74,
        92.57,
        "source videos of short side 320, 19,796 validation videos",
        initialised_from="ImageNet",
    ),
    _mmaction2(
        "tpn_slowonly_r50_k400",
        "scratch",
        KINETICS400,
        _dense(8, 8),
        "tpn-slowonly_r50_8xb8-8x8x1-150e_kinetics400-rgb_20220913-97d0835d",
        74.2,
        91.48,
        "trained from random initialisation",
        initialised_from=None,
    ),
    _mmaction2(
        "tpn_tsm_r50_sthv1",
        "in1k",
        STHV1,
        _STHV1,
        "tpn-tsm_imagenet-pretrained-r50_8xb8-1x1x8-150e_sthv1-rgb_20230221-940a3615",
        51.87,
        79.67,
        "its publisher's table says 8 clips x 3 crops, its configuration samples twice: 2 clips",
        initialised_from="ImageNet",
    ),
    _original("slowonly_r50_k400", KINETICS400, _dense(8, 8, True), "1uKHvZsY_heFHTBl6RXo02I7-W_aLBhFI", 74.9, _LOWRES),
    _original("tpn_slowonly_r50_k400", KINETICS400, _dense(8, 8, True), "1KoISwdKDlfzZdEsLItygcvPGkKNwWyR-", 76.1, _LOWRES),
    _original("slowonly_r50_16x4_k400", KINETICS400, _dense(16, 4, True), "1Qgck89mUVs9gyUzalbYJPfJPwQEPbyI9", 76.1, _LOWRES),
    _original("tpn_slowonly_r50_16x4_k400", KINETICS400, _dense(16, 4, True), "1TY39uBR-ckUw3aiabeFLNpR9uPSxt--H", 77.3, _LOWRES),
    _original("slowonly_r50_32x2_k400", KINETICS400, _dense(32, 2, True), "1oJ1sTzMeLPXHtnutJAAD8gWfm0b3NYpi", 75.7, _LOWRES),
    _original("tpn_slowonly_r50_32x2_k400", KINETICS400, _dense(32, 2, True), "1TjeqcTJ2tReDz4VnLR8ajSHySre9sZDd", 77.7, _LOWRES),
    _original("slowonly_r101_k400", KINETICS400, _dense(8, 8, True), "1dqLWiI3DFHAPIzGtEY_jfI66nthw2GEX", 76.0, _LOWRES),
    _original("tpn_slowonly_r101_k400", KINETICS400, _dense(8, 8, True), "1B4Vsld-JzQe4QmXeZHd0TolMPNyZypXI", 77.2, _LOWRES),
    _original("slowonly_r101_16x4_k400", KINETICS400, _dense(16, 4, True), "1tj2Y0OChKW7RoElXXmBeU63dph40kEyJ", 77.0, _LOWRES),
    _original(
        "tpn_slowonly_r101_16x4_k400", KINETICS400, _dense(16, 4, True), "1mT4kuaYuAGA-Zjagc56vByMQdvx0bE-H", 78.1, _LOWRES
    ),
    _original("slowonly_r101_32x2_k400", KINETICS400, _dense(32, 2, True), "1IAobiYS3PhXC1sA_MCdudGCdHRWcWc9J", 77.4, _LOWRES),
    _original(
        "tpn_slowonly_r101_32x2_k400", KINETICS400, _dense(32, 2, True), "1OPudI7CzJzpdeI0YpwLgZB59VCzcoidp", 78.9, _LOWRES
    ),
    _original(
        "tpn_slowonly_r50_k400",
        KINETICS400,
        _dense(8, 8, True),
        "1pCY4oiWK3hs6MwaPZ8QVPMb-qDCV56w5",
        76.7,
        _HIRES,
        "original_hires",
    ),
    _original(
        "tpn_slowonly_r101_k400",
        KINETICS400,
        _dense(8, 8, True),
        "1DeVp7cf-dk-x6Um4NouLq5tFniTge0Bd",
        78.2,
        _HIRES,
        "original_hires",
    ),
    _original("tsm_r50_sthv1", STHV1, _STHV1, "1x7iwL2Op0qxaUluyQCPOVVEEH53cavhL", 48.2, "", model_args=_IN_PLACE),
    _original("tpn_tsm_r50_sthv1", STHV1, _STHV1, "1NVjsCYgNXKUKAn33XCxV2YEIaWXlEnLS", 50.7, "", model_args=_IN_PLACE),
    _original("tsm_r50_sthv2", STHV2, _STHV2, "1fU1b9WySld5knJ8E2bMXfuyRenoViSEX", 62.3, "", model_args=_IN_PLACE),
    _original("tpn_tsm_r50_sthv2", STHV2, _STHV2, "15HHKGIhksTf0dSmgxrTsoHzZxF6n7eRa", 64.7, "", model_args=_IN_PLACE),
    Weights(
        "tpn_slowonly_tiny_motion",
        "scratch",
        MOTION,
        InputSpec(16, 2, num_clips=3, num_crops=1, short_side=64, crop_size=64, three_crop_size=64, mirrored=motion.MIRRORED),
        "tpn",
        None,
        False,
        None,
        None,
        measured_top1=100.0,
        measured_top5=100.0,
        note="a small model of what tpn.video.motion renders, for demonstrations and tests",
    ),
)

WEIGHTS: Mapping[str, Weights] = MappingProxyType({entry.name: entry for entry in _TABLE})
"""Every entry by its name, "model.tag". The first entry of a model is its default."""


CUSTOM = "tpn"
"""The architecture that has no entry: the pyramid on a backbone of the user's choice, `tpn.zoo.custom`."""


class UnknownModelError(ValueError):
    """No model or checkpoint of that name."""


def get_weights(name: str) -> Weights:
    """Return the entry of "model.tag", or of a model's default tag; UnknownModelError names the nearest ones."""
    if name in WEIGHTS:
        return WEIGHTS[name]
    if name == CUSTOM:
        raise UnknownModelError(
            "'tpn' is the pyramid on a backbone of your choice, of which nothing is known beforehand: "
            "create_model('tpn', backbone='timm/resnet50', num_classes=K)"
        )
    model, _, tag = name.partition(".")
    tags = [entry for entry in WEIGHTS.values() if entry.model == model]
    if tags and not tag:
        return tags[0]
    if tags:
        raise UnknownModelError(f"{model} has no weights {tag!r}; it has {', '.join(entry.tag for entry in tags)}")
    models = list(dict.fromkeys(entry.model for entry in WEIGHTS.values()))
    near = difflib.get_close_matches(model, models, n=3, cutoff=0.0)
    raise UnknownModelError(
        f"unknown model {name!r}; the nearest are {', '.join(near)}; tpn.list_models() and `tpn list` have all"
    )


@cache
def _read_labels(file: str) -> tuple[str, ...]:
    text = resources.files("tpn.zoo").joinpath("labels").joinpath(f"{file}.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())
