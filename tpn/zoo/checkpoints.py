"""The table of checkpoints, one entry each. Everything else reads it: entry points, docs, and the command line.

A new checkpoint is a new entry; the first entry of a model is its default. Entries come from the MMAction2 model zoo (layout
"mmaction2", direct links) and from the table of decisionforce/TPN (layout "original", links to a file-sharing site behind a
confirmation page). Reported accuracies are theirs; both projects are released under Apache-2.0. The entry of layout "tpn" was
trained by this project and ships with it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from tpn.config import HeadConfig, InputSpec, ModelConfig, PartConfig
from tpn.errors import UnknownModelError, nearest
from tpn.video import motion

if TYPE_CHECKING:
    from tpn.zoo.convert import Layout


@dataclass(frozen=True)
class Embedded:
    """A file that ships with this package, in `tpn/zoo/embedded`."""

    file: str
    access: ClassVar[str] = "ships with tpn"
    url: ClassVar[None] = None
    sha256: ClassVar[None] = None

    @property
    def path(self) -> Path:
        return Path(str(resources.files("tpn.zoo"))) / "embedded" / self.file


@dataclass(frozen=True)
class HubFiles:
    """A repository on the Hub with the `model.safetensors` of a saved model.

    Attributes:
        repo_id: "owner/name".
        commit: full hash; None for the newest commit.
        sha256: of `model.safetensors`; None to accept any.
    """

    repo_id: str
    commit: str | None = None
    sha256: str | None = None
    access: ClassVar[str] = "automatic"

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{self.repo_id}"


@dataclass(frozen=True)
class Link:
    """A direct link to a checkpoint in any layout, with the leading hex digits of its SHA-256."""

    url: str
    sha256: str
    access: ClassVar[str] = "automatic"


@dataclass(frozen=True)
class Page:
    """A web page from which a person downloads a checkpoint."""

    url: str
    access: ClassVar[str] = "manual"
    sha256: ClassVar[None] = None


Source = Embedded | HubFiles | Link | Page
Size = tuple[int, float]
"""`Checkpoint.params` and `gmacs`."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint.

    Attributes:
        name: "model.tag": the name of the entry point, and that of the checkpoint.
        config: the model, with the input and the labels that it was trained with.
        source: where the weights are.
        layout: the code base that wrote the file; see `tpn.zoo.convert`.
        dataset: title of the training data.
        params: number of parameters, as `tpn.zoo.create.count` counts them.
        gmacs: 10**9 multiply-accumulate operations per clip, two decimals.
        reported_top1: top-1 in percent that the publisher reports.
        reported_top5: top-5 in percent that the publisher reports.
        measured_top1: top-1 in percent that this project measured.
        measured_top5: top-5 in percent that this project measured.
        initialized_from: weights that training started from.
        note: what the publisher says about data or protocol.
        license: of the weights.
    """

    name: str
    config: ModelConfig
    source: Source
    layout: "Layout"
    dataset: str
    params: int
    gmacs: float
    reported_top1: float | None = None
    reported_top5: float | None = None
    measured_top1: float | None = None
    measured_top5: float | None = None
    initialized_from: str = "random"
    note: str = ""
    license: str = "apache-2.0"

    @property
    def model(self) -> str:
        return self.name.partition(".")[0]

    @property
    def tag(self) -> str:
        return self.name.partition(".")[2]

    @property
    def publisher(self) -> str:
        return {"mmaction2": "MMAction2", "original": "decisionforce/TPN", "tpn": "tpn"}[self.layout]

    @property
    def mirror(self) -> str | None:
        """The Hub repository under $TPN_HUB_NAMESPACE, an owner whom the user trusts, if set."""
        namespace = os.environ.get("TPN_HUB_NAMESPACE")
        return f"{namespace}/{self.name}" if namespace else None

    @property
    def protocol(self) -> str:
        """The test protocol of the reported accuracy, in words."""
        spec = self.config.input_spec
        flip = ", each also flipped" if spec.flip else ""
        crops = f"{spec.num_crops} crops" if spec.num_crops > 1 else "1 crop"
        return f"{spec.num_clips} clips x {crops} of {spec.view_size}{flip}; mean of softmax over {spec.num_views} views"


@cache
def read_labels(file: str) -> tuple[str, ...]:
    """Return the class names in `labels/{file}.txt`, in training order."""
    text = resources.files("tpn.zoo").joinpath("labels").joinpath(f"{file}.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def _config(model: str, layout: "Layout") -> ModelConfig:
    """Return the config of a published network, "[tpn_]slowonly_r50[_16x4]_k400" or "[tpn_]tsm_r50_sthv1"."""
    family, depth, *tempo, data = model.removeprefix("tpn_").split("_")
    labels, neck = read_labels(data), PartConfig("tpn")
    if family == "tsm":
        spec = InputSpec(8, 1, "segments", num_clips=2, num_crops=3, flip_label_pairs=_FLIP_LABEL_PAIRS)
        backbone = PartConfig("tsm", {"depth": 50, "shift_shortcut": layout == "original"})
    else:
        frames, interval = map(int, tempo[0].split("x")) if tempo else (8, 8)
        spec = InputSpec(frames, interval, num_clips=10, num_crops=3, flip=layout == "original")
        backbone = PartConfig("slowonly", {"depth": int(depth[1:])})
        if depth == "r101":  # these pyramids keep two frames of the finer level, all others one
            neck = PartConfig("tpn", {"temporal_scales": (frames // 2, frames)})
    head = HeadConfig(len(labels))
    if not model.startswith("tpn_"):
        return ModelConfig(backbone, None, head, spec, None, labels, model)
    return ModelConfig(backbone, neck, head, spec, head, labels, model)


def _published(name: str, layout: "Layout", source: Source, size: Size, **about: Any) -> Checkpoint:
    model = name.partition(".")[0]
    return Checkpoint(name, _config(model, layout), source, layout, _DATASETS[model.rpartition("_")[2]], *size, **about)


def _mmaction2(name: str, size: Size, file: str, top1: float, top5: float, note: str, start: str = "ImageNet") -> Checkpoint:
    folder, _, date_and_hash = file.rpartition("_")
    url = f"https://download.openmmlab.com/mmaction/v1.0/recognition/tpn/{folder}/{file}.pth"
    about = {"reported_top1": top1, "reported_top5": top5, "note": note, "initialized_from": start}
    return _published(name, "mmaction2", Link(url, date_and_hash.partition("-")[2]), size, **about)


def _original(model: str, size: Size, file_id: str, top1: float, *, hires: bool = False) -> Checkpoint:
    page = Page(f"https://drive.google.com/open?id={file_id}")
    lowres = "240x320 source videos, 19,769 validation videos" if model.endswith("k400") else ""
    note, tag = ("raw-resolution source videos", "original_hires") if hires else (lowres, "original")
    return _published(f"{model}.{tag}", "original", page, size, reported_top1=top1, note=note, initialized_from="ImageNet")


_DATASETS = {"k400": "Kinetics-400", "sthv1": "Something-Something v1", "sthv2": "Something-Something v2"}
_FLIP_LABEL_PAIRS = (
    ("Pulling something from left to right", "Pulling something from right to left"),
    ("Pushing something from left to right", "Pushing something from right to left"),
    ("Turning the camera left while filming something", "Turning the camera right while filming something"),
)
"""In both versions of Something-Something."""

_TABLE = (
    _mmaction2(
        "tpn_slowonly_r50_k400.in1k",
        (91_498_336, 50.28),
        "tpn-slowonly_imagenet-pretrained-r50_8xb8-8x8x1-150e_kinetics400-rgb_20220913-fed3f4c1",
        *(76.74, 92.57),
        "source videos of short side 320, 19,796 validation videos",
    ),
    _mmaction2(
        "tpn_slowonly_r50_k400.scratch",
        (91_498_336, 50.28),
        "tpn-slowonly_r50_8xb8-8x8x1-150e_kinetics400-rgb_20220913-97d0835d",
        *(74.2, 91.48),
        "trained from random initialization",
        "random",
    ),
    _mmaction2(
        "tpn_tsm_r50_sthv1.in1k",
        (82_445_724, 41.23),
        "tpn-tsm_imagenet-pretrained-r50_8xb8-1x1x8-150e_sthv1-rgb_20230221-940a3615",
        *(51.87, 79.67),
        "the publisher's table says 8 clips x 3 crops; the configuration samples twice: 2 clips",
    ),
    _original("slowonly_r50_k400", (32_454_096, 41.74), "1uKHvZsY_heFHTBl6RXo02I7-W_aLBhFI", 74.9),
    _original("tpn_slowonly_r50_k400", (91_498_336, 50.28), "1KoISwdKDlfzZdEsLItygcvPGkKNwWyR-", 76.1),
    _original("slowonly_r50_16x4_k400", (32_454_096, 83.48), "1Qgck89mUVs9gyUzalbYJPfJPwQEPbyI9", 76.1),
    _original("tpn_slowonly_r50_16x4_k400", (91_498_336, 99.57), "1TY39uBR-ckUw3aiabeFLNpR9uPSxt--H", 77.3),
    _original("slowonly_r50_32x2_k400", (32_454_096, 166.96), "1oJ1sTzMeLPXHtnutJAAD8gWfm0b3NYpi", 75.7),
    _original("tpn_slowonly_r50_32x2_k400", (91_498_336, 198.16), "1TjeqcTJ2tReDz4VnLR8ajSHySre9sZDd", 77.7),
    _original("slowonly_r101_k400", (60_359_120, 85.41), "1dqLWiI3DFHAPIzGtEY_jfI66nthw2GEX", 76.0),
    _original("tpn_slowonly_r101_k400", (119_403_360, 94.1), "1B4Vsld-JzQe4QmXeZHd0TolMPNyZypXI", 77.2),
    _original("slowonly_r101_16x4_k400", (60_359_120, 170.83), "1tj2Y0OChKW7RoElXXmBeU63dph40kEyJ", 77.0),
    _original("tpn_slowonly_r101_16x4_k400", (119_403_360, 187.07), "1mT4kuaYuAGA-Zjagc56vByMQdvx0bE-H", 78.1),
    _original("slowonly_r101_32x2_k400", (60_359_120, 341.65), "1IAobiYS3PhXC1sA_MCdudGCdHRWcWc9J", 77.4),
    _original("tpn_slowonly_r101_32x2_k400", (119_403_360, 373.0), "1OPudI7CzJzpdeI0YpwLgZB59VCzcoidp", 78.9),
    _original("tpn_slowonly_r50_k400", (91_498_336, 50.28), "1pCY4oiWK3hs6MwaPZ8QVPMb-qDCV56w5", 76.7, hires=True),
    _original("tpn_slowonly_r101_k400", (119_403_360, 94.1), "1DeVp7cf-dk-x6Um4NouLq5tFniTge0Bd", 78.2, hires=True),
    _original("tsm_r50_sthv1", (23_864_558, 32.7), "1x7iwL2Op0qxaUluyQCPOVVEEH53cavhL", 48.2),
    _original("tpn_tsm_r50_sthv1", (82_445_724, 41.23), "1NVjsCYgNXKUKAn33XCxV2YEIaWXlEnLS", 50.7),
    _original("tsm_r50_sthv2", (23_864_558, 32.7), "1fU1b9WySld5knJ8E2bMXfuyRenoViSEX", 62.3),
    _original("tpn_tsm_r50_sthv2", (82_445_724, 41.23), "15HHKGIhksTf0dSmgxrTsoHzZxF6n7eRa", 64.7),
    Checkpoint(
        "tpn_slowonly_tiny_motion.scratch",
        ModelConfig(
            backbone=PartConfig("slowonly", {"depth": 18, "base_channels": 16}),
            neck=PartConfig("tpn"),
            head=HeadConfig(len(motion.CLASSES), drop_rate=0.2),
            aux_head=HeadConfig(len(motion.CLASSES), drop_rate=0.2),
            input_spec=InputSpec(16, 2, num_clips=3, num_crops=1, short_side=64, crop_size=64, flip_label_pairs=motion.MIRRORED),
            labels=motion.CLASSES,
            architecture="tpn_slowonly_tiny_motion",
        ),
        Embedded("tpn_slowonly_tiny_motion.scratch.safetensors"),
        "tpn",
        "rendered motion",
        params=1_487_788,
        gmacs=0.24,
        measured_top1=99.14,
        measured_top5=100.0,
        note="a small model for the motions that tpn.video.motion renders, for demonstrations and tests",
    ),
)

CHECKPOINTS: Mapping[str, Checkpoint] = MappingProxyType({entry.name: entry for entry in _TABLE})
"""Every entry by its name, "model.tag"."""


def get_checkpoint(name: str) -> Checkpoint:
    """Return the entry of "model.tag", or the default entry of "model".

    Raises UnknownModelError, which names the nearest models.
    """
    if name in CHECKPOINTS:
        return CHECKPOINTS[name]
    model, _, tag = name.partition(".")
    entries = [entry for entry in CHECKPOINTS.values() if entry.model == model]
    if entries and not tag:
        return entries[0]
    if entries:
        raise UnknownModelError(f"{model} has no checkpoint {tag!r}; it has {', '.join(entry.tag for entry in entries)}")
    if model == "tpn":
        raise UnknownModelError(
            "'tpn' has no published weights; create_model('tpn', backbone='timm/resnet50', num_classes=K) builds a model"
        )
    raise unknown_model(name)


def unknown_model(name: str) -> UnknownModelError:
    """Return the error for a name of no model, which says what the name is instead, or names the nearest models."""
    if name.endswith((".onnx", ".pt2", ".xml")):
        reason = "exported files are for predict, timeline, demo, and evaluate only; pass the model that the file was made from"
    elif os.path.isfile(name):
        reason = "it is a file; pass the folder of a saved model, or a model's name and this file as its checkpoint"
    elif os.path.isdir(name):
        reason = "this folder has no config.json, so it is not a saved model"
    elif set(name) & set(":/"):
        reason = "there is no such folder, and a model on the Hub is 'hf-hub:owner/name'"
    else:
        near = nearest(name.partition(".")[0], {entry.model for entry in CHECKPOINTS.values()})
        reason = f"the nearest are {near}; tpn list shows all (tpn.list_models() in Python)"
    return UnknownModelError(f"unknown model {name!r}; {reason}")
