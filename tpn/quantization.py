"""Post-training quantization to int8 with NNCF, on clips of real videos."""

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpn import openvino_runtime
from tpn.config import InputSpec
from tpn.files import StrPath
from tpn.models.classifier import TPNClassifier
from tpn.video import lists
from tpn.video.datasets import Item, VideoDataset, open_dataset, open_validation

MIN_AGREEMENT = 0.98
"""Share of the held-back clips that must have the same result as in float32, without labels."""
FEW = 50
"""Fewer held-back clips than this say little."""
MAX_CALIBRATION = 300
MAX_HELD_BACK = 100
"""Largest numbers of videos."""


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize` measured on held-back clips, which it did not calibrate with.

    Attributes:
        calibration: number of clips used for calibration.
        held_back: number of clips held back.
        agreement: share of the held-back clips whose most probable class is the same as in float32; for a multi-label model,
            whose classes above a probability of 0.5 are.
        accuracy: share of the held-back clips whose most probable class is the label. None without `max_drop`.
        accuracy_float32: the same in float32. None without `max_drop`.
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
            f"same result as in float32 on {self.agreement:.1%} of {self.held_back} held-back clips",
            f"{len(self.left_out)} layers left out" + (f" ({', '.join(self.left_out)})" if self.left_out else ""),
        ]
        if self.accuracy is not None:
            parts.insert(2, f"accuracy {self.accuracy:.1%}, in float32 {self.accuracy_float32:.1%}")
        return ", ".join(parts)


def divide_data(
    data: StrPath, spec: InputSpec, classes: Sequence[str] | None, **options: Any
) -> tuple[VideoDataset, VideoDataset]:
    """Return different videos of a dataset for calibration and for the comparison with float32.

    Those for training calibrate, and those for validation are compared, or for testing if there are none for validation.
    Data without a split is divided at random.

    Args:
        data: a folder, table or list, as for `tpn.train`.
        spec: of the clips.
        classes: of the model if the labels matter.
        **options: for `open_dataset`.

    Raises ValueError: there are fewer than two videos.
    """
    folders = lists.split_folders(data)
    whole = open_dataset(folders.get("train", data), spec, train=False, classes=classes, **options)
    calibration = _shuffled([item for item in whole.items if item.split in ("", "train")])
    if folders or len(calibration) < len(whole):
        held_back = _shuffled(open_validation(data, spec, classes=whole.classes, **options).items)
    else:
        sources = list(dict.fromkeys(item.group or item.path for item in calibration))
        chosen = {*sources[: min(MAX_HELD_BACK, len(sources) // 3 or 1)]}
        held_back = [item for item in calibration if (item.group or item.path) in chosen]
        calibration = [item for item in calibration if (item.group or item.path) not in chosen]
    if not calibration:
        raise ValueError(
            f"{data} has no video for calibration beside the {len(held_back)} for the comparison; at least 2 videos are needed, "
            f"and {MAX_CALIBRATION + MAX_HELD_BACK} are better"
        )
    return whole.part(calibration[:MAX_CALIBRATION], train=False), whole.part(held_back[:MAX_HELD_BACK], train=False)


def _shuffled(items: Sequence[Item]) -> list[Item]:
    return [items[i] for i in np.random.default_rng(0).permutation(len(items))]


def quantize(
    converted: Any, model: TPNClassifier, calibration: VideoDataset, held_back: VideoDataset, *, max_drop: float | None
) -> tuple[Any, QuantizationReport]:
    """Return an `openvino.Model` in int8; see `tpn.export.export_openvino`.

    Args:
        converted: the `openvino.Model` of `model`, which is ready for inference on the CPU.

    Raises ValueError: leaving layers out does not reach the wanted agreement or accuracy.
    """
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    logging.getLogger("nncf").setLevel(logging.ERROR)  # set_log_level also changes the handlers of others
    decide = _classes_above_half if model.multi_label else _most_probable

    def to_clip(pair: tuple[Tensor, Any]) -> NDArray[np.float32]:
        return np.asarray(held_back.spec.normalize(pair[0]).unsqueeze(0))

    def decisions(run: Callable[[Tensor], Tensor]) -> list[Any]:
        with torch.inference_mode():
            return [decide(run(torch.from_numpy(to_clip(pair)))[0]) for pair in pairs]

    # Each video is read once; where one is damaged, the label is that of the video in its place.
    pairs = [held_back[i] for i in range(len(held_back))]
    labels, original = [label for _, label in pairs], decisions(model)
    expected = original if max_drop is None else labels
    pairs = [(frames, each) for (frames, _), each in zip(pairs, expected, strict=True)]
    allowed = 1 - MIN_AGREEMENT if max_drop is None else max_drop

    def share_of_hits(compiled: Any, pairs: Iterable[tuple[Tensor, Any]]) -> tuple[float, list[float]]:
        """Return the share of clips with the expected decision, and 1 or 0 for each clip."""
        hits = [float(decide(compiled(to_clip(pair))[0][0]) == pair[1]) for pair in pairs]
        return sum(hits) / len(hits), hits

    def run() -> Any:
        return nncf.quantize_with_accuracy_control(
            converted,
            nncf.Dataset([calibration[i] for i in range(len(calibration))], to_clip),
            nncf.Dataset(pairs, to_clip),
            share_of_hits,
            max_drop=allowed,
            drop_type=nncf.DropType.ABSOLUTE,
            subset_size=len(calibration),
            fast_bias_correction=False,
            advanced_quantization_parameters=AdvancedQuantizationParameters(
                activations_range_estimator_params=RangeEstimatorParametersSet.HISTOGRAM
            ),
        )

    with redirect_stdout(sys.stderr):  # progress bars
        quantized = openvino_runtime.in_other_thread(run)
    got = decisions(openvino_runtime.runner(quantized, openvino_runtime.fastest_precision()))
    report = QuantizationReport(
        calibration=len(calibration),
        held_back=len(held_back),
        agreement=_equal(got, original),
        accuracy=None if max_drop is None else _equal(got, labels),
        accuracy_float32=None if max_drop is None else _equal(original, labels),
        left_out=tuple(op.get_friendly_name() for op in quantized.get_ordered_ops() if _has_float_weights(op)),
    )
    if _equal(original, expected) - _equal(got, expected) > allowed + 1e-9:
        raise ValueError(
            f"{report}; a drop of {allowed:.1%} is allowed. Calibrate with more videos of the classes of the model"
            + ("" if max_drop is None else ", or allow a larger drop")
        )
    return quantized, report


def _most_probable(logits: Any) -> int:
    return int(logits.argmax())


def _classes_above_half(logits: Any) -> tuple[bool, ...]:
    return tuple((logits > 0).tolist())


def _equal(first: Sequence[Any], second: Sequence[Any]) -> float:
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first)


def _has_float_weights(op: Any) -> bool:
    if op.get_type_name() not in ("Convolution", "GroupConvolution", "MatMul"):
        return False
    source = op.input_value(1).get_node()
    while source.get_type_name() != "Constant" and source.get_input_size():
        source = source.input_value(0).get_node()
    return source.get_type_name() == "Constant" and source.get_element_type().is_real()
