"""Measure a model on labeled videos, each counted once: `tpn.evaluate`, and the validation of a training."""

import base64
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tpn.config import InputSpec, parse_views
from tpn.errors import plural
from tpn.exported import ExportedClassifier
from tpn.files import StrPath, atomic_write, file_sha256
from tpn.models.classifier import TPNClassifier, require_input_spec, unwrapped
from tpn.models.layers import evaluating, reference_tensor, weights_hash
from tpn.predict import FramesAndClips, Prediction, Progress, Unreadable, VideoClassifier, open_model
from tpn.training.distributed import all_gather_object, join_processes, rank_and_world_size, run_on_rank0
from tpn.training.metrics import Evaluation, check_calibration, write_results
from tpn.training.report import write_report
from tpn.training.wording import calibration_line
from tpn.video.ahead import read_ahead
from tpn.video.datasets import VideoDataset, bad_reason, open_validation
from tpn.video.decode import VideoError
from tpn.zoo.create import input_spec
from tpn.zoo.names import is_exported, local_folder
from tpn.zoo.saved import save_temperature

Network = TPNClassifier | ExportedClassifier
Result = NDArray[np.float32] | str
"""Probabilities (K,) of a video, or the reason why it cannot be read."""
SamplingOverrides = tuple[str | None, float | None, int | None]
"""The arguments views, target_fps and frame_interval of `evaluate`."""

_logger = logging.getLogger(__name__)


def evaluate(
    model: StrPath | Network,
    data: StrPath,
    *,
    output: StrPath | None = None,
    views: str | None = None,
    calibrate: bool = False,
    checkpoint: StrPath | None = None,
    root: StrPath | None = None,
    frames: str | None = None,
    first_frame: int = 1,
    target_fps: float | None = None,
    frame_interval: int | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    precision: str | None = None,
    compile: bool = False,
    workers: int = 2,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure the accuracy of a model on labeled videos, or the average precision of a multi-label model.

    Every video counts once. Unreadable videos are not counted; `failed` of the result lists them. Under torchrun, each process
    classifies a share of the videos, and all of them return the whole result.

    Args:
        model: a name, whose published weights are loaded; the folder of a saved model; an exported file; or a model, whose mode
            does not change.
        data: a folder of class folders, a table, or a list of videos, with the classes of the model. Of data with a split, the
            validation part is evaluated. For a model without class names, those of the data are in alphabetical order.
        output: folder for `report.html`, `summary.json` and `per_class.csv`; created if necessary. The same call resumes an
            interrupted evaluation. All processes must share the folder. Default: write nothing.
        views: clips along time and crops of each, such as "10x3" or "1x1". Default: the test protocol of the weights.
        calibrate: fit the temperature of the model to these videos, on which the model must not have been trained. It is set in
            `model`, or saved if `model` is a folder. The result and the files in `output` have the numbers before and after
            calibration. Those after it are optimistic; see `Evaluation.calibrate`.
        checkpoint: with a name, load the weights in this file.
        root: base folder of relative paths in a list. Default: the list's folder.
        frames: file names of extracted frames, such as "img_{:05d}.jpg".
        first_frame: number of the first extracted frame.
        target_fps: sample as if every video had this frame rate. Default: that of the model's `input_spec`.
        frame_interval: index step between the frames of a clip: twice the model's own shows it videos at twice the speed. Not for
            models that sample segments. Default: that of the model's `input_spec`.
        device: see `VideoClassifier`.
        batch_size: see `VideoClassifier`.
        precision: see `VideoClassifier`.
        compile: see `VideoClassifier`.
        workers: threads that read videos ahead.
        progress: called with (videos done, all videos), an estimate if there are several processes.

    Raises:
        TypeError, ValueError: an argument is not valid; the classes of data and model differ; `output` has unfinished results of
            other weights, videos, or settings; no video can be read; with `calibrate`, the model is not one that can be changed,
            or no temperature fits.
        UnknownModelError, CheckpointError, WeightsUnavailableError, OSError: as in `create_model`.

    Example:
        >>> tpn.evaluate("runs/doors", "videos/val").metrics["top1"]
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if frames is not None and target_fps is not None:
        raise ValueError(f"target_fps is not valid for extracted frames, which have no frame rate, got {target_fps}")
    if calibrate and checkpoint is not None:
        raise ValueError("calibrate is not valid with a checkpoint: the temperature belongs to the weights of the folder")
    folder = _folder_to_calibrate(model) if calibrate else None
    name, network, spec = _open_model(model, checkpoint, precision, (views, target_fps, frame_interval))
    if isinstance(network, ExportedClassifier):
        precision = None if isinstance(model, str | os.PathLike) else precision
    elif isinstance(model, str | os.PathLike):
        device, precision = device or ("cuda" if torch.cuda.is_available() else "cpu"), precision or "float32"
    _, _, place = join_processes(device or str(reference_tensor(network).device), "gloo")  # processes exchange only results
    dataset = open_validation(data, spec, classes=network.labels, root=root, template=frames, first=first_frame)
    _check_classes(network, dataset, data)
    if calibrate:
        check_calibration(dataset.targets.numpy())
    journal = None
    if output is not None:
        settings = {"precision": precision, "frames": [frames, first_frame], "input": spec.to_dict()}
        journal = Journal(Path(output, "unfinished"), _identity(network, dataset) | settings)
    with evaluating(network):
        classifier = VideoClassifier(network, device=place, batch_size=batch_size, precision=precision, compile=compile)
        classifier.spec = spec
        results = _classify_all(classifier, dataset, journal, workers, progress)
    evaluation = evaluation_of(dataset, results, network)
    if calibrate:
        fitted = evaluation.calibrate()
        evaluation = replace(evaluation, calibrated=fitted)
        if folder is not None:
            run_on_rank0(lambda: save_temperature(folder, fitted.temperature))
        else:
            network.temperature = fitted.temperature
    if journal is not None:
        run_on_rank0(lambda: _finish(journal, evaluation, dataset, name, os.fspath(data)))
    return evaluation


def classify_dataset(
    classifier: VideoClassifier, data: VideoDataset, indices: Sequence[int], *, workers: int
) -> Iterator[tuple[int, Result]]:
    """Classify videos, given by their index, and yield (index, result) in the same order. Threads read videos ahead."""
    spec = classifier.spec

    def read(index: int) -> FramesAndClips | Unreadable:
        try:
            return data.read(data.items[index], spec.indices, short_side=spec.short_side)
        except (VideoError, OSError) as error:
            return error

    with closing(read_ahead(read, indices, workers=workers)) as videos:
        for index, result in zip(indices, classifier.classify_each(videos), strict=True):
            yield index, result.probs.numpy() if isinstance(result, Prediction) else bad_reason(data.items[index], result)


def evaluation_of(data: VideoDataset, results: dict[int, Result], model: Network) -> Evaluation:
    """Combine a model's results of all videos, by index. Raises ValueError if no video could be read."""
    failed = {data.items[index].name: result for index, result in sorted(results.items()) if isinstance(result, str)}
    done = [(index, result) for index, result in sorted(results.items()) if not isinstance(result, str)]
    if not done:
        raise ValueError(f"all {len(data)} videos are unreadable. The first error: {next(iter(failed.values()))}")
    indices = [index for index, _ in done]
    return Evaluation(
        classes=data.classes,
        items=tuple(data.items[index] for index in indices),
        probs=np.stack([probs for _, probs in done]),
        targets=data.targets[indices].numpy(),
        views=data.spec.num_views,
        frame_interval=data.spec.frame_interval if data.spec.sampling == "dense" else None,
        multi_label=model.multi_label,
        failed=failed,
        temperature=model.temperature,
    )


def validate(model: TPNClassifier, data: VideoDataset, *, workers: int = 1, amp: torch.dtype = torch.float32) -> Evaluation:
    """Evaluate a model during training, with the views of `data.spec`. The mode of every module is restored.

    In a distributed run, each process takes a share of the videos, and all of them must call this function and get the result.

    Args:
        model: on any device, in any mode.
        data: dataset with `train=False`.
        workers: threads that read videos ahead.
        amp: dtype of autocast; float32 disables it.
    """
    rank, world_size = rank_and_world_size()
    device = next(model.parameters()).device
    with evaluating(model), torch.autocast(device.type, amp, enabled=amp != torch.float32):
        classifier = VideoClassifier(model)
        classifier.spec = data.spec
        share = dict(classify_dataset(classifier, data, range(rank, len(data), world_size), workers=max(workers, 1)))
    results = {index: result for part in all_gather_object(share) for index, result in part.items()}
    return evaluation_of(data, results, model)


def _classify_all(
    classifier: VideoClassifier, data: VideoDataset, journal: "Journal | None", workers: int, progress: Progress | None
) -> dict[int, Result]:
    """Return the results of all videos: those in the journal, and those of all processes, which share the other videos."""
    rank, world_size = rank_and_world_size()
    finished = {} if journal is None else run_on_rank0(journal.open)
    share = [index for index in range(len(data)) if index not in finished][rank::world_size]
    mine: dict[int, Result] = {}

    def report() -> None:
        if progress is not None:
            progress(min(len(finished) + len(mine) * world_size, len(data)), len(data))

    report()
    for index, result in classify_dataset(classifier, data, share, workers=workers):
        mine[index] = result
        if journal is not None and not isinstance(result, str):
            journal.add(index, result)
        report()
    return {index: result for part in [finished, *all_gather_object(mine)] for index, result in part.items()}


class Journal:
    """Results of finished videos on disk, from which a killed evaluation resumes: one file per process in `folder`.

    Args:
        folder: created if necessary.
        identity: settings that results must share to be merged, in types that JSON has.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, json.loads(json.dumps(identity))
        self.file = folder / f"{uuid.uuid4().hex}.jsonl"

    def open(self) -> dict[int, Result]:
        """Return the probabilities of earlier runs by the index of the video. Raises ValueError if their identity differs."""
        about = self.folder / "about.json"
        if about.exists() and json.loads(about.read_text()) != self.identity:
            raise ValueError(
                f"{self.folder} has results of other weights, videos, or settings; remove it, or choose another output folder"
            )
        if not about.exists():
            with atomic_write(about) as unfinished:
                unfinished.write_text(json.dumps(self.identity))
        lines = [line for path in self.folder.glob("*.jsonl") for line in path.read_text().splitlines()]
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # a killed process may leave half a line
        return {row["index"]: np.frombuffer(base64.b64decode(row["probs"]), np.float32) for row in rows}

    def add(self, index: int, probs: NDArray[np.float32]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)  # rank 0 may be on another machine
        with self.file.open("a") as file:
            file.write(json.dumps({"index": index, "probs": base64.b64encode(probs.tobytes()).decode()}) + "\n")


def _open_model(
    model: StrPath | Network, checkpoint: StrPath | None, precision: str | None, sampling: SamplingOverrides
) -> tuple[str, Network, InputSpec]:
    """Return a name for the results, the model with its weights, and the clips to read."""
    if isinstance(model, str | os.PathLike):
        name = os.fspath(model)
        if sampling != (None, None, None) and not is_exported(name):
            _resampled(input_spec(name), *sampling)  # raises before a download
        network = open_model(model, checkpoint is None, precision=precision, checkpoint_path=checkpoint)
    elif checkpoint is not None:
        raise ValueError("checkpoint is not valid here: it is for a model's name, got a model")
    else:
        network = unwrapped(model)
        if not isinstance(network, Network):
            raise TypeError(f"model must be a name, a folder, or a TPNClassifier, got {type(network).__name__}")
        name = str(network.path or "exported") if isinstance(network, ExportedClassifier) else network.architecture
    spec = _resampled(require_input_spec(network), *sampling)
    if isinstance(model, str | os.PathLike):
        network.input_spec = spec  # a compiled model is compiled for these views
    return name, network, spec


def _resampled(spec: InputSpec, views: str | None, target_fps: float | None, frame_interval: int | None) -> InputSpec:
    """Return a spec with the clips that the arguments ask for; None keeps a value."""
    if views is not None:
        spec = spec.with_views(*parse_views(views))
    if target_fps is not None:
        spec = replace(spec, target_fps=target_fps)
    if frame_interval is not None and spec.sampling == "segments":
        raise ValueError(
            f"frame_interval is not valid here: the model takes one frame from each of {spec.num_frames} segments of a video, "
            f"got {frame_interval}"
        )
    return spec if frame_interval is None else replace(spec, frame_interval=frame_interval)


def _folder_to_calibrate(model: StrPath | Network) -> Path | None:
    """Return the folder of a saved model, None for a model. ValueError for one whose temperature cannot be set or saved."""
    if isinstance(model, ExportedClassifier) or (isinstance(model, str | os.PathLike) and is_exported(model)):
        raise ValueError("calibrate is not valid for an exported model, which is fixed; calibrate the model, and export it again")
    if not isinstance(model, str | os.PathLike):
        return None
    if (folder := local_folder(model)) is None:
        raise ValueError(
            f"calibrate saves the temperature with the model, and {model} is not a folder. Save a published model in one: "
            "tpn.save_pretrained(tpn.create_model(NAME, pretrained=True), FOLDER), and evaluate FOLDER"
        )
    return folder


def _check_classes(model: Network, data: VideoDataset, source: StrPath) -> None:
    """Raise ValueError if the labels of the videos are not those of the model. Warn if only their number can be compared."""
    if len(data.classes) != model.num_classes:
        raise ValueError(f"{source} has {len(data.classes)} classes, but the model has {model.num_classes}")
    if data.multi_label and not model.multi_label:
        raise ValueError(
            f"{source} has videos with several classes, but the model is for one class; train a model on multi-label data"
        )
    if model.labels is None and not data.numbered:
        _logger.warning(
            "the model has no class names: it takes the classes of %s in alphabetical order; set model.labels", source
        )


def _identity(model: Network, data: VideoDataset) -> dict[str, Any]:
    videos = hashlib.sha256(repr(data.items).encode(errors="backslashreplace"))
    if isinstance(model, ExportedClassifier):  # an OpenVINO file contains the SHA-256 of its weights
        weights = model.about["id"] if model.path is None else file_sha256(model.path)
        return {"weights": weights, "videos": videos.hexdigest(), "model": f"exported, {model.precision}"}
    config = None
    with suppress(ValueError):  # models put together by hand have no config
        config = repr(model.config)
    about = {"videos": videos.hexdigest(), "model": config, "temperature": model.temperature}
    return {"weights": weights_hash(model)} | about


def _finish(journal: Journal, evaluation: Evaluation, data: VideoDataset, name: str, source: str) -> None:
    """Write the results, and remove the journal if no video is left to read, or the temperature of its results is outdated."""
    folder = journal.folder.parent
    write_results(evaluation, folder, model=name, data=source)
    facts = {"Data": source, "Views": f"{plural(evaluation.views, 'view')} of each video"}
    if evaluation.frame_interval:
        facts["Frame interval"] = str(evaluation.frame_interval)
    if evaluation.calibrated is not None:
        facts["Calibration"] = calibration_line(evaluation)
    write_report(folder / "report.html", evaluation, data, title=f"Evaluation of {name}", facts=facts)
    if not evaluation.failed or evaluation.calibrated is not None:
        rmtree(journal.folder)
