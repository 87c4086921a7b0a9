"""Classify each person or object of a video along its track.

A track is a video of its own: square crops along its boxes, from its first to its last frame, see `tpn.video.crops.square_boxes`.
The video is decoded once for all tracks. In memory are one frame and the crops that unfinished clips need.
"""

import os
from collections import defaultdict, deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpn import tempo
from tpn.config import InputSpec
from tpn.errors import printable
from tpn.files import StrPath
from tpn.predict import Prediction, Progress, Unreadable, VideoClassifier
from tpn.tempo import Clip
from tpn.validation import check_int
from tpn.video import decode
from tpn.video.crops import SquareCrops
from tpn.video.decode import VideoError
from tpn.video.sampling import FrameSampler, at_frame_rate, dense_indices
from tpn.video.sources import Array, FramesAndClips, channels_first
from tpn.video.tracks import Track, TrackSource, read_tracks

Indices = NDArray[np.int64]


def classify(
    classifier: VideoClassifier,
    video: StrPath | Array,
    tracks: TrackSource,
    *,
    num_clips: int | None = None,
    num_crops: int | None = None,
    progress: Progress | None = None,
) -> list[Prediction | Unreadable]:
    """Return a prediction for each track of a video.

    Args:
        classifier: its test protocol applies to each track. The three crops of a square are equal, and computed once.
        video: a path, or frames, uint8 RGB (T, H, W, 3) or (T, 3, H, W).
        tracks: see `read_tracks`.
        num_clips: as in `VideoClassifier`.
        num_crops: as in `VideoClassifier`.
        progress: called with (tracks done, tracks).

    Returns:
        In the order of `read_tracks(tracks)`; a `VideoError` for a track that is outside the picture, that needs frames after the
        end of the video, or damaged ones.

    Raises:
        VideoError, OSError: a file cannot be read at all.
        TypeError, ValueError: the video or the tracks are not as described.
    """
    tracks = read_tracks(tracks)
    spec = classifier.spec.with_views(num_clips, num_crops)
    path = os.fspath(video) if isinstance(video, str | os.PathLike) else None
    sample: FrameSampler = spec.indices
    if spec.target_fps is not None and path is not None:
        sample = at_frame_rate(sample, decode.header(path)[0], spec.target_fps)
    crops = [SquareCrops(track, spec.short_side) for track in tracks]
    requests = [[sample(len(track))] for track in tracks]
    if spec.num_crops == 3:
        spec = replace(spec, num_crops=1, short_side=spec.view_size, crop_size=spec.view_size)
    results: dict[int, Prediction | Unreadable] = {}
    for place, result in _classify(classifier, video, crops, requests, spec):
        results[place] = replace(result, source=path) if isinstance(result, Prediction) else result
        if progress is not None:
            progress(len(results), len(tracks))
    return [results[place] for place in range(len(tracks))]


def slide(
    classifier: VideoClassifier,
    video: StrPath | Array,
    tracks: TrackSource,
    *,
    stride: int | None = None,
    frame_interval: int | None = None,
) -> Generator[tuple[Track, list[Clip], Unreadable | None]]:
    """Classify a clip that slides along each track, as `tempo.slide` does along a video.

    Args:
        classifier: as in `classify`.
        video: as in `classify`.
        tracks: as in `classify`.
        stride: as in `tempo.slide`. The clips of a track start at its first frame.
        frame_interval: as in `tempo.slide`.

    Yields:
        Each track, in the order in which the tracks end; its clips, with numbers of frames of the video; and the error that ended
        it early, or None.

    Raises:
        VideoError, OSError: a file cannot be read at all.
        TypeError, ValueError: as in `tempo.slide` and `classify`.
    """
    tracks = read_tracks(tracks)
    spec = tempo.sliding_spec(classifier.spec, frame_interval)
    stride = tempo.default_stride(spec) if stride is None else stride
    check_int("stride", stride, minimum=1)
    if not classifier.model.num_classes:
        raise ValueError("the model has no classes (num_classes=0), and cannot classify tracks")
    requests = [_sliding_indices(len(track), spec, stride) for track in tracks]
    crops = [SquareCrops(track, spec.short_side) for track in tracks]
    return _slide(tracks, requests, spec, _classify(classifier, video, crops, requests, spec))


def _slide(
    tracks: Sequence[Track],
    requests: Sequence[Sequence[Indices]],
    spec: InputSpec,
    results: Iterable[tuple[int, Prediction | Unreadable]],
) -> Generator[tuple[Track, list[Clip], Unreadable | None]]:
    found: dict[int, list[Clip]] = {place: [] for place in range(len(tracks))}
    for place, result in results:
        track, clips = tracks[place], found[place]
        if not isinstance(result, Prediction):
            yield track, found.pop(place), result
            continue
        indices = requests[place][len(clips)]
        last = track.last if len(track) < spec.clip_span else track.first + int(indices.max())
        clips.append(Clip(track.first + int(indices.min()), last, result.probs))
        if len(clips) == len(requests[place]):
            yield track, found.pop(place), None


def segments(track: Track, clips: Sequence[Clip], *, fps: float, min_probability: float = 0.5) -> list[tempo.Segment]:
    """Join neighboring clips of a track to segments, as `tempo.segments` does; the first starts with the track."""
    start = track.first / fps
    own = [replace(clip, first=clip.first - track.first, last=clip.last - track.first) for clip in clips]
    found = tempo.segments(own, fps=fps, min_probability=min_probability)
    return [replace(segment, start=segment.start + start, end=segment.end + start) for segment in found]


def _sliding_indices(length: int, spec: InputSpec, stride: int) -> list[Indices]:
    """Return the clips of a track, (1, T) each, as `tempo.slide` takes them from a video of so many frames."""
    if length < spec.clip_span:
        return [dense_indices(length, num_frames=spec.num_frames, frame_interval=spec.frame_interval)]
    clip = np.arange(spec.num_frames)[None] * spec.frame_interval
    return [start + clip for start in range(0, length - spec.clip_span + 1, stride)]


def _classify(
    classifier: VideoClassifier,
    video: StrPath | Array,
    crops: Sequence[SquareCrops],
    requests: Sequence[Sequence[Indices]],
    spec: InputSpec,
) -> Generator[tuple[int, Prediction | Unreadable]]:
    """Yield the number of a track and the result for each of its requests as they are complete; after an error no others.

    Args:
        crops: of each track.
        requests: of each track, clips (n, T) as indices into its frames, in the order of their last frames.
    """
    order: deque[int] = deque()

    def clips() -> Generator[FramesAndClips | Unreadable]:
        for place, each in _read(video, crops, requests):
            order.append(place)
            yield each

    for result in classifier.classify_each(clips(), spec=spec):
        yield order.popleft(), result


class _OpenTrack:
    """A track with the crops that its next clips need, by their place in the track."""

    def __init__(self, crops: SquareCrops, requests: Sequence[Indices]) -> None:
        self.crops, self.requests = crops, deque(requests)
        self.numbers = crops.first + np.unique(np.concatenate([indices.ravel() for indices in requests]))
        self.kept: dict[int, Tensor] = {}

    def add(self, number: int, frame: Tensor) -> Generator[FramesAndClips]:
        """Take a frame of the video, and yield the clips that are complete."""
        place = number - self.crops.first
        self.kept[place] = self.crops(number, frame)
        while self.requests and self.requests[0].max() == place:
            indices = self.requests.popleft()
            distinct, positions = np.unique(indices, return_inverse=True)
            yield torch.stack([self.kept[i] for i in distinct.tolist()]), torch.from_numpy(positions.reshape(indices.shape))
            start = self.requests[0].min() if self.requests else place + 1
            self.kept = {i: crop for i, crop in self.kept.items() if i >= start}


def _read(
    video: StrPath | Array, crops: Sequence[SquareCrops], requests: Sequence[Sequence[Indices]]
) -> Generator[tuple[int, FramesAndClips | VideoError]]:
    """Decode a video once. Yield the number of a track and its next clips, or the error that ends it."""
    where = f"{printable(os.fspath(video))}: " if isinstance(video, str | os.PathLike) else ""
    tracks = {place: _OpenTrack(*each) for place, each in enumerate(zip(crops, requests, strict=True))}
    needed: dict[int, list[int]] = defaultdict(list)
    for place, track in tracks.items():
        for number in track.numbers.tolist():
            needed[number].append(place)
    failure: VideoError | None = None
    if isinstance(video, str | os.PathLike):
        decode.header(video)  # raises for a file that is not a video
    try:
        for frame, number in _frames(video, sorted(needed)):
            for place in needed.pop(number):
                if place not in tracks:
                    continue
                try:
                    for clips in tracks[place].add(number, frame):
                        yield place, clips
                except VideoError as error:
                    yield place, VideoError(f"{where}{error}")
                    del tracks[place]
    except VideoError as error:
        failure = error
    for place, track in tracks.items():
        if track.requests:
            last = int(track.numbers[-1])
            yield place, failure or VideoError(f"{where}track {track.crops.track.id}: the video ends before its frame {last}")


def _frames(video: StrPath | Array, numbers: Sequence[int]) -> Generator[tuple[Tensor, int]]:
    """Yield the frames with increasing numbers, (3, H, W), as far as they exist."""
    if isinstance(video, str | os.PathLike):
        yield from zip(decode.iter_frames(video, indices=numbers), numbers, strict=False)
    elif isinstance(video, np.ndarray | Tensor):
        frames = channels_first(video)
        yield from ((frames[number], number) for number in numbers if number < len(frames))
    else:
        raise TypeError(f"video must be a path or an array of frames, got {type(video).__name__}")
