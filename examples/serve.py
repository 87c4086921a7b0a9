"""Classify a video with an exported model, without PyTorch and without tpn: numpy, onnxruntime and PyAV.

tpn export tpn_slowonly_r50_k400 --output model.onnx
python examples/serve.py model.onnx video.mp4
"""

import json
import sys

import av
import numpy as np
import onnxruntime


def clips(spec: dict, total: int) -> np.ndarray:
    """Frame numbers (clips, frames) in a video of so many frames."""
    frames, count = spec["num_frames"], spec["num_clips"]
    if spec["sampling"] == "segments":  # the middle of each segment; "twice" adds its start
        starts = [0.5, 0.0][:count]
        return np.array([(np.arange(frames) + start) * total / frames for start in starts]).astype(int)
    last = max(total - ((frames - 1) * spec["frame_interval"] + 1), 0)
    starts = np.round(np.linspace(0, last, count)) if count > 1 else np.array([last // 2])
    return (starts[:, None] + np.arange(frames) * spec["frame_interval"]).astype(int) % total


def resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, without antialiasing, as in training."""
    for axis, size in ((1, height), (2, width)):
        length = frames.shape[axis]
        place = ((np.arange(size) + 0.5) * length / size - 0.5).clip(0, length - 1)
        low = place.astype(int)
        weight = (place - low).reshape([-1 if i == axis else 1 for i in range(4)])
        high = np.minimum(low + 1, length - 1)
        frames = frames.take(low, axis) * (1 - weight) + frames.take(high, axis) * weight
    return frames.round()


def crops(spec: dict, frames: np.ndarray) -> list[np.ndarray]:
    """Frames (N, H, W, 3), resized, then cut in the centre or at three places along the longer side."""
    size, (height, width) = spec["crop_size"], frames.shape[1:3]
    short = size if spec["num_crops"] == 3 else spec["short_side"]
    frames = resize(frames, *(int(side * short / min(height, width) + 0.5) for side in (height, width)))
    middle = (np.array(frames.shape[1:3]) - size) // 2
    corners = [0 * middle, 2 * middle, middle] if spec["num_crops"] == 3 else [middle]
    return [frames[:, top : top + size, left : left + size] for top, left in corners]


def main(model: str, video: str) -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["tpn"])
    spec, labels = about["input_spec"], about["labels"]
    with av.open(video) as file:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    views = np.concatenate([crop[clips(spec, len(frames))] for crop in crops(spec, frames)])  # (views, T, S, S, 3)
    x = ((views - spec["mean"]) / spec["std"]).transpose(0, 4, 1, 2, 3).astype(np.float32)
    (logits,) = session.run(["logits"], {"clips": x})
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs = (odds / odds.sum(axis=1, keepdims=True)).mean(axis=0)
    for k in probs.argsort()[::-1][:3]:
        print(f"{probs[k]:7.2%}  {labels[k]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
