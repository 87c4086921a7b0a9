"""Post-training quantization to int8 with NNCF, on clips of real videos."""

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpn import openvino_runtime
from tpn.config import InputSpec
from tpn.video import lists
from tpn.video.datasets import VideoDataset, open_dataset

MIN_AGREEMENT = 0.98
"""Share of the held-back clips whose most probable class must be the same as in float32."""
MAX_CALIBRATION = 300
MAX_HELD_BACK = 100
"""Largest numbers of videos."""

Clip = NDArray[np.float32]


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize` measured on held-back clips, which it did not calibrate with.

    Attributes:
        calibration, held_back: numbers of clips.
        agreement: share of the held-back clips whose most probable class is the same as in float32.
        accuracy, accuracy_float32: shares whose most probable class is the label; None without `max_drop`.
        left_out: convolutions and matrix products that are not quantized.
    """

    calibration: int
    held_back: int
    agreement: float
    accuracy: float | None
    accuracy_float32: float | None
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        parts = [
            f"int8, calibrated on {self.calibration} clips",
            f"top-1 as in float32 on {self.agreement:.1%} of {self.held_back} held-back clips",
            f"{len(self.left_out)} layers left out" + (f" ({', '.join(self.left_out)})" if self.left_out else ""),
        ]
        if self.accuracy is not None:
            parts.insert(2, f"accuracy {self.accuracy:.1%}, in float32 {self.accuracy_float32:.1%}")
        return ", ".join(parts)


class Clips:
    """The middle clip of each video of a dataset, as (1, C, T, S, S) float32; read once, into a temporary file."""

    def __init__(self, data: VideoDataset) -> None:
        self.spec = data.spec
        shape = (len(data), self.spec.num_frames, self.spec.in_chans, self.spec.crop_size, self.spec.crop_size)
        with tempfile.TemporaryFile() as file:
            self.frames = np.memmap(file, np.uint8, "w+", shape=shape)
        for index in range(len(data)):
            self.frames[index] = data[index][0].numpy()

    def __len__(self) -> int:
        return len(self.frames)

    def __iter__(self) -> Iterator[Clip]:
        for frames in self.frames:
            yield self.spec.normalize(torch.from_numpy(np.asarray(frames))).unsqueeze(0).numpy()


class Pairs:
    """Clips with what is expected of each."""

    def __init__(self, clips: Clips, expected: Sequence[Any]) -> None:
        self.clips, self.expected = clips, expected

    def __len__(self) -> int:
        return len(self.clips)

    def __iter__(self) -> Iterator[tuple[Clip, Any]]:
        return zip(self.clips, self.expected, strict=True)


def open_data(
    data: str | os.PathLike[str], spec: InputSpec, classes: Sequence[str] | None, **options: Any
) -> tuple[VideoDataset, VideoDataset]:
    """Return different videos of a dataset for calibration and for the comparison with float32.

    Those for training calibrate, and those for validation are compared; data without a split is divided at random.

    Args:
        data: a folder, table or list, as for `tpn.train`.
        spec: of the clips.
        classes: of the model if the labels matter.
        **options: for `open_dataset`.

    Raises ValueError: there are fewer than two videos.
    """
    folders = lists.split_folders(data)
    whole = open_dataset(folders.get("train", data), spec, train=False, classes=classes, **options)
    items = [whole.items[i] for i in np.random.default_rng(0).permutation(len(whole))]
    calibration = [item for item in items if item.split in ("", "train")]
    held_back = [item for item in items if item.split not in ("", "train")]
    if other := folders.get("val") or folders.get("test"):
        whole_held_back = open_dataset(other, spec, train=False, classes=whole.classes, **options)
        held_back = [whole_held_back.items[i] for i in np.random.default_rng(0).permutation(len(whole_held_back))]
    if not held_back:
        count = min(MAX_HELD_BACK, len(calibration) // 3 or 1)
        held_back, calibration = calibration[:count], calibration[count:]
    if not calibration:
        raise ValueError(f"{data} has {len(items)} video for calibration; at least 2 are needed, and 300 are better")
    return whole.part(calibration[:MAX_CALIBRATION], train=False), whole.part(held_back[:MAX_HELD_BACK], train=False)


def quantize(
    model: Any, calibration: VideoDataset, held_back: VideoDataset, *, max_drop: float | None
) -> tuple[Any, QuantizationReport]:
    """Return an `openvino.Model` in int8; see `tpn.export.export_openvino`.

    Raises ValueError: fewer than `MIN_AGREEMENT` of the held-back clips agree with float32.
    """
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    nncf.set_log_level(logging.ERROR)
    shape = list(model.inputs[0].get_partial_shape())
    model.reshape({0: [1, *shape[1:]]})
    clips, labels = Clips(held_back), held_back.labels
    original = _top1(openvino_runtime.runner(model, "float32"), clips)
    with redirect_stdout(sys.stderr):  # progress bars
        quantized = nncf.quantize_with_accuracy_control(
            model,
            nncf.Dataset(Clips(calibration)),
            nncf.Dataset(Pairs(clips, original if max_drop is None else labels), lambda pair: pair[0]),
            _share_of_hits,
            max_drop=1 - MIN_AGREEMENT if max_drop is None else max_drop,
            drop_type=nncf.DropType.ABSOLUTE,
            subset_size=len(calibration),
            fast_bias_correction=False,
            advanced_quantization_parameters=AdvancedQuantizationParameters(
                activations_range_estimator_params=RangeEstimatorParametersSet.HISTOGRAM
            ),
        )
    got = _top1(openvino_runtime.runner(quantized, "auto"), clips)
    report = QuantizationReport(
        calibration=len(calibration),
        held_back=len(held_back),
        agreement=_equal(got, original),
        accuracy=None if max_drop is None else _equal(got, labels),
        accuracy_float32=None if max_drop is None else _equal(original, labels),
        left_out=tuple(op.get_friendly_name() for op in quantized.get_ordered_ops() if _has_float_weights(op)),
    )
    if report.agreement < MIN_AGREEMENT:
        raise ValueError(
            f"in int8, only {report.agreement:.1%} of {len(held_back)} held-back clips have the same most probable class as in "
            f"float32, and at least {MIN_AGREEMENT:.0%} are needed; calibrate with more videos of the classes of the model"
        )
    quantized.reshape({0: shape})
    return quantized, report


def _top1(run: Callable[[Tensor], Tensor], clips: Clips) -> list[int]:
    return [int(run(torch.from_numpy(clip)).argmax()) for clip in clips]


def _equal(first: Sequence[Any], second: Sequence[Any]) -> float:
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first)


def _share_of_hits(compiled: Any, pairs: Iterable[tuple[Clip, Any]]) -> tuple[float, list[float]]:
    """Return the share of clips whose most probable class is the expected one, and 1 or 0 for each clip."""
    hits = [float(compiled(clip)[0].argmax() == expected) for clip, expected in pairs]
    return sum(hits) / len(hits), hits


def _has_float_weights(op: Any) -> bool:
    if op.get_type_name() not in ("Convolution", "GroupConvolution", "MatMul"):
        return False
    source = op.input_value(1).get_node()
    while source.get_type_name() != "Constant" and source.get_input_size():
        source = source.input_value(0).get_node()
    return source.get_type_name() == "Constant" and source.get_element_type().is_real()
