"""Frames of files, pipes and cameras, in order, and the newest item of a generator."""

import io
import itertools
import os
import sys
import threading
from contextlib import closing, nullcontext
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from two_motions import raw
from videos import write_video as write_numbered

from tpn.video import decode, live
from tpn.video.decode import VideoError
from tpn.video.live import Camera, newest, raw_frames


def test_every_frame_of_a_file_in_order(motions, tmp_path):
    path = write_numbered(tmp_path / "a.mp4", num_frames=7, size=(128, 96))
    frames = list(decode.iter_frames(path))
    assert torch.equal(torch.stack(frames), decode.read_frames(path, range(7)))
    small = list(decode.iter_frames(path, short_side=48))
    assert torch.equal(torch.stack(small), decode.read_frames(path, range(7), short_side=48))
    assert decode.header(path) == (25, 7)


def test_raw_frames_are_whole(motions):
    frames = np.load(motions / "frames.npy")[:3]
    read = list(raw_frames(io.BytesIO(raw(frames)), size=(112, 112)))
    assert np.array_equal(torch.stack(read), frames)
    wide = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
    assert np.array_equal(torch.stack(list(raw_frames(io.BytesIO(wide.tobytes()), size=(6, 4)))), wide.transpose(0, 3, 1, 2))
    with pytest.raises(VideoError, match="the pipe: .*frame 2.* 37631 .* 37632 bytes.*112x112"):
        list(raw_frames(io.BytesIO(raw(frames)[:-1]), size=(112, 112)))
    with pytest.raises(VideoError, match="the pipe: no frames"):
        next(raw_frames(io.BytesIO(), size=(112, 112)))


def test_camera():
    camera = Camera("testsrc=rate=30:size=64x48:duration=0.2", format="lavfi")
    assert camera.fps == 30
    frames = list(camera)
    assert len(frames) == 6
    assert {(frame.shape, frame.dtype) for frame in frames} == {((3, 48, 64), torch.uint8)}


def test_unavailable_camera(monkeypatch):
    with pytest.raises(VideoError, match="nonsense: cannot open"):
        Camera("nonsense", format="lavfi")
    with pytest.raises(VideoError, match="0: .*unheard"):
        Camera("0", format="unheard")
    monkeypatch.setattr(sys, "platform", "plan9")
    with pytest.raises(VideoError, match="plan9"):
        Camera("0")


@pytest.mark.parametrize(
    ("platform", "device", "opened"),
    [
        ("linux", "2", "/dev/video2"),
        ("linux", "/dev/video2", "/dev/video2"),
        ("darwin", "0", "0"),
        ("win32", "My cam", "video=My cam"),
    ],
)
def test_device_names_and_options(monkeypatch, platform, device, opened):
    calls = []

    def fake_open(*args, **kwargs):
        calls.append((args, kwargs))
        return SimpleNamespace(streams=SimpleNamespace(video=[SimpleNamespace(average_rate=None)]), close=lambda: None)

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(live, "formats_available", set(live.FORMATS.values()))
    monkeypatch.setattr(live.av, "open", fake_open)
    camera = Camera(device, size=(640, 480), fps=15)
    options = {"video_size": "640x480", "framerate": "15"}
    assert calls == [((opened,), {"format": live.FORMATS[platform], "options": options})]
    assert camera.fps == 15
    with pytest.raises(ValueError, match="frame rate.*fps"):
        Camera(device)


def test_camera_without_a_new_frame_and_camera_failure():
    camera = Camera("testsrc=rate=30:size=8x8", format="lavfi")
    image = av.VideoFrame.from_ndarray(np.zeros((8, 8, 3), np.uint8))
    steps = [image, av.BlockingIOError(35, "not yet"), image, image, av.OSError(5, "Input/output error")]

    def decode(video):
        while steps:
            if isinstance(step := steps.pop(0), Exception):
                raise step
            yield step

    camera._container = nullcontext(SimpleNamespace(decode=decode))
    seen = []
    with pytest.raises(VideoError, match="Input/output error"):
        seen.extend(camera)
    assert len(seen) == 3


def test_raw_frames_without_a_buffer():
    """One read from a pipe may return less than a frame."""
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), np.uint8)
    reading, writing = os.pipe()
    sender = threading.Thread(
        target=lambda: [os.write(writing, frames.tobytes()[i : i + 777]) for i in range(0, frames.size, 777)]
    )
    sender.start()
    with open(reading, "rb", buffering=0) as file:
        got = itertools.islice(raw_frames(file, size=(50, 40)), 3)
        assert np.array_equal(torch.stack(list(got)).permute(0, 2, 3, 1).numpy(), frames)
    sender.join()
    os.close(writing)


def test_closing_newest_ends_its_generator():
    ended = threading.Event()

    def count():
        try:
            number = 0
            while True:
                yield (number := number + 1)
        finally:
            ended.set()

    with closing(newest(count())) as items:
        assert next(items) < next(items)
    assert ended.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name == "tpn-live"]


def test_newest_raises_the_errors_of_its_generator():
    def broken():
        yield 1
        raise VideoError("unplugged")

    with pytest.raises(VideoError, match="unplugged"):
        list(newest(broken()))
    assert list(newest(i for i in range(1))) == [0]
