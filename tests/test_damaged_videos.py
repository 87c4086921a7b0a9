"""Files that are damaged, hostile, or no videos: each gives frames or one error that names it."""

import random
import time

import av
import numpy as np
import pytest
from odd_videos import FRAGMENTS, N
from PIL import Image
from readers import READERS, each_reader
from videos import write_video

from tpn.cli.script import error_message
from tpn.video import containers, decode
from tpn.video.decode import VideoError
from tpn.video.frame_folders import read_image
from tpn.video.items import Item, bad_reason


def use_threads(monkeypatch, count):
    """Decode in this number of threads, whatever the number of cores; `verify` always uses one."""
    main_stream = containers._main_stream

    def main_stream_with_threads(path, container):
        stream = main_stream(path, container)
        stream.codec_context.thread_count = count
        return stream

    monkeypatch.setattr(containers, "_main_stream", main_stream_with_threads)


def outcome(read, path):
    """What a function returns, or its error, which must be one line that names the file."""
    try:
        return read(path)
    except (VideoError, IndexError) as error:
        message = str(error)
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1
    return message


def count_frames(path):
    return sum(1 for _ in decode.iter_frames(path))


TRUNCATED = {
    "h264.mp4": {"codec": "libx264", "g": 12, "movflags": "faststart"},
    "h264 fragments.mp4": {"codec": "libx264", "g": 12, "movflags": FRAGMENTS},
    "h264.flv": {"codec": "libx264", "g": 12},
    "mpeg4.avi": {"codec": "mpeg4", "bf": 2},
    "utvideo.avi": {"codec": "utvideo"},
}


@pytest.mark.parametrize("name", TRUNCATED)
def test_damage_does_not_depend_on_the_number_of_threads(tmp_path, name, monkeypatch):
    data = write_video(tmp_path / name, N, **TRUNCATED[name]).read_bytes()
    cut, rng = tmp_path / f"cut {name}", random.Random(0)
    failures = 0
    for _ in range(12):
        cut.write_bytes(data[: rng.randrange(len(data) // 2, len(data))])
        results = []
        for threads in (1, 8):
            with monkeypatch.context() as patch:
                use_threads(patch, threads)
                results.append([outcome(read, cut) for read in (decode.verify, count_frames, READERS["sample_frames"])])
        (one, one_count, one_sampled), (eight, eight_count, eight_sampled) = results
        assert one == eight
        assert isinstance(one, str) == isinstance(one_count, str) == isinstance(eight_count, str)
        assert isinstance(one_sampled, str) == isinstance(eight_sampled, str)
        failures += isinstance(one, str)
    assert failures


def mutate(data, rng):
    data = bytearray(data)
    at, other, count = rng.randrange(len(data)), rng.randrange(len(data)), rng.randint(1, 500)
    kind = rng.randrange(6)
    if kind == 0:  # truncated
        del data[at + 1 :]
    elif kind == 1:  # a part is missing
        del data[at : at + count]
    elif kind == 2:  # a part is in the wrong place
        data[at : at + count] = data[other : other + count]
    elif kind == 3:  # a number is as large as it can be, or 0
        data[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\0\xff\xff\xff"))
    else:  # bytes anywhere, or in the header
        for _ in range(rng.randint(1, 12)):
            data[rng.randrange(len(data) if kind == 4 else min(len(data), 600))] = rng.randrange(256)
    return bytes(data)


MUTATED = {
    "v.mp4": {"codec": "libx264", "g": 12},
    "mpeg4.mp4": {"codec": "mpeg4", "bf": 2},
    "v.mov": {"codec": "svq1", "pix_fmt": "yuv410p"},
    "v.mkv": {"codec": "libx264", "g": 12},
    "v.webm": {"codec": "libvpx-vp9", "deadline": "realtime", "cpu_used": 8},
    "v.avi": {"codec": "mpeg4"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "v.ts": {"codec": "libx264", "g": 12},
    "mpeg2.ts": {"codec": "mpeg2video", "bf": 2},
    "v.mpg": {"codec": "mpeg2video"},
    "v.flv": {"codec": "flv"},
    "v.wmv": {"codec": "wmv2"},
    "v.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "v.apng": {"codec": "apng", "pix_fmt": "rgb24"},
    "v.nut": {"codec": "libx264", "g": 12},
    "v.mxf": {"codec": "mpeg2video", "g": 12},
    "v.rm": {"codec": "rv20", "size": (176, 144)},
    "v.y4m": {"codec": "wrapped_avframe"},
}


@pytest.mark.parametrize("name", MUTATED)
def test_altered_files_give_frames_or_one_error(tmp_path, name):
    data = write_video(tmp_path / name, N, **MUTATED[name]).read_bytes()
    path = tmp_path / f"altered {name}"
    started = time.monotonic()
    for i in range(30):
        path.write_bytes(mutate(data, random.Random(f"{name} {i}")))
        for read in (READERS["sample_frames"], [*READERS.values()][i % len(READERS)]):
            outcome(read, path)
    assert time.monotonic() - started < 100


FAILURES = [
    AttributeError("no attribute 'width'"),
    LookupError("not found"),
    MemoryError(),
    ZeroDivisionError("division by zero"),
    av.error.MemoryError(12, "Cannot allocate memory"),
    av.error.InvalidDataError(1094995529, "Invalid data found when processing input"),
]


UNAFFECTED = {"open": set(), "demux": {"header", "read_frames"}, "decode": {"header"}}
"""Functions that do not get as far as to an error in opening, demuxing, or decoding."""


class Failing:
    """A container, or a packet, that fails."""

    size, is_discard, is_corrupt, pts, dts, is_keyframe = 1, False, False, 0, 0, True

    def __init__(self, error, container=None, packets=()):
        self.error, self.container, self.packets = error, container, packets

    def __getattr__(self, name):
        return getattr(self.container, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.container.close()

    def demux(self, stream):
        yield from self.packets or self.container.demux(stream)
        raise self.error

    def decode(self):
        raise self.error


@pytest.mark.parametrize("stage", UNAFFECTED)
@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_each_error_of_the_library_names_the_file(tmp_path, monkeypatch, error, stage):
    path = write_video(tmp_path / "v.avi", 5, codec="mjpeg", pix_fmt="yuvj420p")
    av_open = av.open

    def opened(*args, **kwargs):
        if stage == "open":
            raise error
        return Failing(error, av_open(*args, **kwargs), [Failing(error)] if stage == "decode" else ())

    monkeypatch.setattr(containers.av, "open", opened)
    reason = getattr(error, "strerror", None) or error
    for name in READERS.keys() - UNAFFECTED[stage]:
        with pytest.raises(VideoError, match=f"v.avi: .*{reason}"):
            READERS[name](path)


def test_streams_that_appear_in_the_middle(tmp_path, monkeypatch):
    """PyAV raises IndexError at the end of such a file, before the decoder has returned its last frames."""
    path = write_video(tmp_path / "v.ts", N, codec="libx264", bf=2)
    av_open = av.open
    with av_open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        assert len(packets) == N

    class Ending(Failing):
        def demux(self, stream):
            yield from (packet for packet in self.container.demux(stream) if packet.size)
            raise self.error

    monkeypatch.setattr(containers.av, "open", lambda *a, **k: Ending(IndexError("list index out of range"), av_open(*a, **k)))
    assert decode.verify(path) == decode.probe(path).num_frames == N


def test_errors_of_the_caller_are_not_errors_of_the_file(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.avi", 5)

    def sample(total):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        decode.sample_frames(path, sample)
    with pytest.raises(ValueError, match="sample .*0 to 4, got 5 to 7"):
        decode.sample_frames(path, lambda total: np.array([5, 7]))
    with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
        decode.read_frames(path, [1], short_side=-1)
    assert not isinstance(error.value, VideoError)
    av_open = av.open
    monkeypatch.setattr(containers.av, "open", lambda *a, **k: Failing(KeyboardInterrupt(), av_open(*a, **k)))
    with pytest.raises(KeyboardInterrupt):
        decode.verify(path)


@each_reader
def test_a_stream_without_a_decoder(tmp_path, read):
    path = write_video(tmp_path / "v.mp4", 5, codec="libx264")
    before, _, after = path.read_bytes().rpartition(b"avc1")
    path.write_bytes(before + b"zzzz" + after)
    with pytest.raises(VideoError, match=r"v\.mp4: .*no decoder"):
        read(path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_images(tmp_path):
    rng, path = random.Random(0), tmp_path / "img.jpg"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
    for kind in ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "TGA", "PPM"):
        noise.save(path, format=kind)
        data = path.read_bytes()
        for _ in range(30):
            path.write_bytes(mutate(data, rng))
            outcome(read_image, path)


# Files that refer to others


@pytest.fixture
def pointers(tmp_path):
    """Files that refer to a video, or to themselves."""
    write_video(tmp_path / "v.ts", 5, codec="libx264")
    segment = f"#EXTINF:9,\n{tmp_path}/v.ts\n"
    files = {
        "end.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n{segment}#EXT-X-ENDLIST\n",
        "live.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n{segment}",
        "v.ffconcat": f"ffconcat version 1.0\nfile '{tmp_path}/v.ts'\n",
        "concat.mp4": f"ffconcat version 1.0\nfile '{tmp_path}/v.ts'\n",
        "self.ffconcat": "ffconcat version 1.0\nfile self.ffconcat\nfile self.ffconcat\n",
        "v.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "v.mpd": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for name in ("img%03d.jpg", "img001.jpg", "[0-9]*.png"):
        Image.new("RGB", (64, 48)).save(tmp_path / name)
    return [tmp_path / name for name in (*files, "img%03d.jpg", "[0-9]*.png")]


@each_reader
@pytest.mark.parametrize("by", ["first bytes", "FFmpeg's format"])
def test_files_that_refer_to_others_are_refused(pointers, read, by, monkeypatch):
    if by == "FFmpeg's format":
        monkeypatch.setattr(containers, "NOT_VIDEOS", {})
    for path in pointers:
        with pytest.raises(VideoError, match="not a video") as error:
            read(path)
        assert str(error.value).startswith(f"{path}: ")


# Names


@pytest.mark.parametrize("name", ["a\nb.mp4", "a\r\x1b[2Jb.mp4", "a\u2028b.mp4"])
def test_errors_are_one_line_whatever_the_name(tmp_path, name):
    path = tmp_path / name
    shown = f"{tmp_path}/{ascii(name)[1:-1]}"
    with pytest.raises(FileNotFoundError) as missing:
        decode.probe(path)
    assert error_message(missing.value) == f"{shown}: No such file or directory"
    path.touch()
    with pytest.raises(VideoError) as error:
        decode.probe(path)
    assert error_message(error.value) == f"{shown}: the file is empty"
    assert bad_reason(Item(str(path), 0), error.value) == "the file is empty"
