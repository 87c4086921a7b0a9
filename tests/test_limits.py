"""Memory that a file can take: pictures and numbers of samples above a limit are refused before they are read."""

import multiprocessing
import struct
import sys
import zlib
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from odd_videos import FRAGMENTS, N, edited
from PIL import Image
from readers import READERS
from videos import HEIGHT, WIDTH, add_stream, frame, write_video

from tpn.video import containers, decode
from tpn.video.decode import VideoError
from tpn.video.frame_folders import read_image


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("v.mp4", {"codec": "libx264"}),
        ("v.mkv", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
        ("v.ts", {"codec": "mpeg2video"}),
        ("v.flv", {"codec": "libx264"}),
        ("v.avi", {"codec": "huffyuv", "pix_fmt": "rgb24"}),
        ("v.gif", {"codec": "gif", "pix_fmt": "rgb8"}),
        ("v.apng", {"codec": "apng", "pix_fmt": "rgb24"}),
    ],
)
def test_pictures_above_the_limit_are_refused(tmp_path, monkeypatch, name, options):
    path = write_video(tmp_path / name, 3, size=(320, 240), **options)
    monkeypatch.setattr(containers, "MAX_PIXELS", 320 * 240)
    assert decode.verify(path) == 3
    monkeypatch.setattr(containers, "MAX_PIXELS", 320 * 240 - 1)
    for read in READERS.values():
        if read is not decode.header:
            with pytest.raises(VideoError, match=f"{name}: .* {320 * 240 - 1}( |$)"):
                read(path)


def test_a_picture_that_grows_above_the_limit(tmp_path, monkeypatch):
    small, large = (write_video(tmp_path / f"{h}.ts", 5, codec="libx264", size=(128, h)).read_bytes() for h in (48, 240))
    path = tmp_path / "both.ts"
    path.write_bytes(small + large)
    assert decode.verify(path) > 5
    monkeypatch.setattr(containers, "MAX_PIXELS", 128 * 200)
    with pytest.raises(VideoError, match="both.ts: "):
        decode.verify(path)


def peak():
    """The largest memory of this process in MB, since its start or the fork."""
    return (
        int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1])
        // 1024
    )


def probe_and_measure(path):
    before, error = peak(), ""
    try:
        decode.probe(path)
    except VideoError as raised:
        error = str(raised)
    return peak() - before, error


def peak_memory(path):
    """Run `probe` in a process of its own; return the memory that it took in MB, and its error."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(probe_and_measure, (path,))


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@on_linux
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forks in a process with threads
def test_memory_for_a_huge_picture(tmp_path):
    path = write_video(tmp_path / "v.gif", 3, codec="gif", pix_fmt="rgb8")
    data = path.read_bytes()
    path.write_bytes(data[:6] + struct.pack("<HH", 16000, 16000) + data[10:])
    memory, error = peak_memory(path)
    assert str(containers.MAX_PIXELS) in error
    assert memory < 100


def patched(data, kind, *changes):
    """Replace 4-byte numbers after the name of each box of a kind."""
    data, at = bytearray(data), -1
    while (at := data.find(kind, at + 1)) >= 0:
        for offset, value in changes:
            data[at + 4 + offset : at + 8 + offset] = struct.pack(">I", value)
    return bytes(data)


@on_linux
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_memory_for_declared_samples(tmp_path):
    """FFmpeg takes some 60 bytes for each sample that an MP4 file declares, here more than 500 MB."""
    whole = write_video(tmp_path / "v.mp4", N, codec="mpeg4", bf=2).read_bytes()
    fragments = write_video(tmp_path / "f.mp4", N, codec="libx264", g=12, movflags=FRAGMENTS).read_bytes()
    many = 10**7
    files = {
        "sizes.mp4": patched(whole, b"stsz", (4, 1), (8, many)),
        "fragments.mp4": patched(fragments, b"trun", (4, many)),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        memory, error = peak_memory(tmp_path / name)
        assert "declares" in error
        assert memory < 50


def test_edits_count_as_often_as_they_show_a_sample(tmp_path):
    path = edited(tmp_path / "v.mp4", 0, N, codec="mpeg4", bf=2)
    data = path.read_bytes()
    at = data.index(b"elst")
    entry = data[at + 12 : at + 24]
    grown = 12 * 5000
    data = data[: at + 8] + struct.pack(">I", 5001) + entry + entry * 5000 + data[at + 24 :]
    for kind in (b"moov", b"trak", b"edts", b"elst"):
        start = data.index(kind) - 4
        size = int.from_bytes(data[start : start + 4], "big")
        data = data[:start] + struct.pack(">I", size + grown) + data[start + 4 :]
    path.write_bytes(data)
    with pytest.raises(VideoError, match=f"declares {5001 * N} samples"):
        decode.probe(path)


def test_sound_of_old_movies(tmp_path):
    """They count the samples that are played, many for each byte of compressed sound."""
    path = tmp_path / "v.mov"
    with av.open(str(path), "w") as out:
        video, sound = (
            add_stream(out, "mpeg4", "yuv420p", (WIDTH, HEIGHT), {}),
            out.add_stream("pcm_alaw", rate=8000, layout="mono"),
        )
        for i in range(N):
            image = av.VideoFrame.from_ndarray(frame(i), format="rgb24").reformat(format="yuv420p")
            image.pts, image.time_base = 4 * i, Fraction(1, 100)
            out.mux(video.encode(image))
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        samples.sample_rate = 8000
        out.mux([*video.encode(None), *sound.encode(samples), *sound.encode(None)])
    data = path.read_bytes()
    before, _, after = data.rpartition(b"stsz")
    assert struct.unpack(">II", after[4:12]) == (1, 8000)
    for count, is_refused in ((10 * len(data), False), (20 * len(data), True)):
        path.write_bytes(before + b"stsz" + after[:8] + struct.pack(">I", count) + after[12:])
        with pytest.raises(VideoError, match="declares") if is_refused else nullcontext():
            decode.probe(path)


def write_png(path, size):
    """A small file that says it is a large picture."""
    Image.new("RGB", (8, 8)).save(path, format="PNG")
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", *size)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("size", [(9000, 8000), (16000, 16000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_above_the_limit_are_refused(tmp_path, size):
    path = write_png(tmp_path / "img_00001.jpg", size)
    with pytest.raises(VideoError, match="img_00001.jpg: .* pixels"):
        read_image(path)


def test_images_that_run_programs_are_refused(tmp_path):
    path = tmp_path / "img_00001.jpg"
    Image.new("RGB", (8, 8)).save(path, format="EPS")
    with pytest.raises(VideoError, match="img_00001.jpg: not an image"):
        read_image(path)
