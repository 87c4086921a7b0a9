"""Classify a video with an exported model, without PyTorch and tpn: only numpy, onnxruntime and PyAV.

python examples/serve.py model.onnx video.mp4
"""

import argparse
import json
from collections.abc import Iterator

import av
import numpy as np
import onnxruntime


def frames(video: str) -> Iterator[av.VideoFrame]:
    with av.open(video) as file:
        yield from file.decode(video=0)


def to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """Return RGB (H, W, 3), rotated as the file specifies: phones store the rotation instead of rotating."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))


def clips(spec: dict, total: int) -> np.ndarray:
    """Return frame indices (clips, frames) in a video of `total` frames."""
    steps, count = np.arange(spec["num_frames"]), spec["num_clips"]
    if spec["sampling"] == "segments":  # a first clip from the middles of the segments, a second one from their starts
        return np.array([(steps + start) * (total / len(steps)) for start in (0.5, 0.0)[:count]]).astype(int)
    last = max(total - ((len(steps) - 1) * spec["frame_interval"] + 1), 0)
    starts = np.round(np.arange(count) * (last / (count - 1))) if count > 1 else np.array([last // 2])
    return (starts[:, None] + steps * spec["frame_interval"]).astype(int) % total


def resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize bilinearly without antialiasing, as in training."""
    for axis, size, length in zip((1, 2), (height, width), frames.shape[1:3], strict=True):
        position = ((np.arange(size) + 0.5) * length / size - 0.5).clip(0, length - 1)
        low = position.astype(int)
        weight = (position - low).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(4)])
        frames = frames.take(low, axis) * (1 - weight) + frames.take(np.minimum(low + 1, length - 1), axis) * weight
    return frames.round()


def crops(spec: dict, frames: np.ndarray) -> list[np.ndarray]:
    """Resize frames (N, H, W, 3); return the center crop, or three crops along the longer side."""
    size, sides = spec["crop_size"], frames.shape[1:3]
    scale = (size if spec["num_crops"] == 3 else spec["short_side"]) / min(sides)
    frames = resize(frames, *(int(side * scale + 0.5) for side in sides))
    middle = (np.array(frames.shape[1:3]) - size) // 2
    corners = [0 * middle, 2 * middle, middle] if spec["num_crops"] == 3 else [middle]
    return [frames[:, top : top + size, left : left + size] for top, left in corners]


def main(model: str, video: str) -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["tpn"])
    spec = about["input_spec"]
    indices = clips(spec, sum(1 for _ in frames(video)))
    cropped = {n: crops(spec, to_rgb(frame)[None]) for n, frame in enumerate(frames(video)) if n in indices}
    views = np.array([[cropped[n][i][0] for n in clip] for i in range(spec["num_crops"]) for clip in indices])  # (V, T, S, S, 3)
    x = ((views - spec["mean"]) / spec["std"]).transpose(0, 4, 1, 2, 3).astype(np.float32)
    exp = np.exp(session.run(["logits"], {"clips": x})[0].astype(np.float64))
    probs = (exp / exp.sum(axis=1, keepdims=True)).mean(axis=0) ** (1 / about["temperature"])
    probs /= probs.sum()
    for k in probs.argsort()[:-4:-1]:
        print(f"{probs[k]:7.2%}  {about['labels'][k]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="*.onnx")
    parser.add_argument("video")
    main(**vars(parser.parse_args()))
