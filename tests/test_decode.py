import os
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from servers import run_python
from videos import HEIGHT, WIDTH, add_stream, frame, number, write_video

from tpn.video import containers, decode, frame_index
from tpn.video.ahead import read_ahead
from tpn.video.decode import VideoError, probe, read_frames, sample_frames
from tpn.video.motion import write_dataset
from tpn.video.transforms import resize_short_side

N = 40
SIZE = (WIDTH, 64)  # SVT-AV1 in PyAV 14 needs 64 rows
FORMATS = {
    "h264 with B-frames": ("v.mp4", {"codec": "libx264", "bf": 3, "g": 12}),
    "h264 all key frames": ("v.mov", {"codec": "libx264", "g": 1}),
    "hevc": ("v.mkv", {"codec": "libx265", "x265_params": "log-level=none"}),
    "hevc 10 bit": ("v.mp4", {"codec": "libx265", "pix_fmt": "yuv420p10le", "x265_params": "log-level=none"}),
    "av1": ("v.webm", {"codec": "libsvtav1", "preset": 10, "svtav1_params": "lp=1"}),
    "vp9": ("v.webm", {"codec": "libvpx-vp9", "deadline": "realtime", "cpu_used": 8}),
    "mpeg4": ("v.mp4", {"codec": "mpeg4", "bf": 2}),
    "mpeg4 avi": ("v.avi", {"codec": "mpeg4"}),
    "mjpeg": ("v.mkv", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
    "gif": ("v.gif", {"codec": "gif", "pix_fmt": "rgb8"}),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_frames_are_exact(tmp_path, kind):
    name, options = FORMATS[kind]
    if options["codec"] not in av.codecs_available:
        pytest.skip(f"this build of PyAV has no encoder {options['codec']}")
    path = write_video(tmp_path / name, N, size=SIZE, **options)
    info = probe(path)
    assert (info.num_frames, info.width, info.height) == (N, *SIZE)
    assert [number(f) for f in read_frames(path, range(N))] == list(range(N))
    wanted = [17, 3, 39, 3, 0]
    frames = read_frames(path, wanted)
    assert frames.shape == (5, 3, *SIZE[::-1])
    assert frames.dtype == torch.uint8
    assert [number(f) for f in frames] == wanted


def test_variable_frame_rate(tmp_path):
    times = np.cumsum(np.random.default_rng(0).integers(1, 40, 20)).tolist()
    path = write_video(tmp_path / "v.mkv", 20, codec="libx264", pts=times)
    assert probe(path).num_frames == 20
    assert [number(f) for f in read_frames(path, range(20))] == list(range(20))


def test_sample_frames_returns_distinct_frames_and_positions(tmp_path):
    path = write_video(tmp_path / "v.mp4", 10)
    frames, positions = sample_frames(path, lambda total: np.array([[total - 1, 2], [2, 5]]))
    assert [number(f) for f in frames] == [2, 5, 9]
    assert positions.tolist() == [[2, 0], [0, 1]]
    frames, positions = sample_frames(write_video(tmp_path / "one.mp4", 1), lambda total: np.arange(8) % total)
    assert frames.shape == (1, 3, HEIGHT, WIDTH)
    assert positions.tolist() == [0] * 8


def test_packets_without_frames_at_the_end_are_not_sampled(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", 10)
    monkeypatch.setattr(decode, "read_index", lambda *_: decode.FrameIndex(15))
    frames, _ = sample_frames(path, lambda total: np.array([0, total - 1]))
    assert [number(f) for f in frames] == [0, 9]


CODECS = [  # and whether frames in such a file are located by key frames
    ("v.mp4", "libx264", {"g": 30, "bf": 3}, True),
    ("v.mkv", "libx264", {"g": 30, "x264-params": "open-gop=1:bframes=4"}, True),
    ("v.mkv", "libx264", {"x264-params": "intra-refresh=1:keyint=30"}, False),
    ("v.mp4", "libx265", {"x265-params": "keyint=30:open-gop=1:log-level=0"}, True),
    ("v.webm", "libvpx-vp9", {"g": 30, "deadline": "realtime", "cpu-used": 8}, True),
    ("v.webm", "libsvtav1", {"g": 30, "preset": 10, "svtav1-params": "lp=1"}, True),
    ("v.mp4", "mpeg4", {"g": 30, "bf": 2}, False),
    ("v.avi", "mpeg4", {"g": 30}, False),
    ("v.ts", "libx264", {"g": 30}, False),
    ("v.webm", "libvpx", {"g": 30, "auto-alt-ref": 1, "lag-in-frames": 12}, False),
]


def by_key_frames(path, wanted):
    with decode.open_video(path) as (container, stream):
        index = decode.read_index(container, stream)
    return decode._decode_with_seeks(path, np.array(wanted), index)


@pytest.mark.parametrize("start", [0, 700])
@pytest.mark.parametrize(
    ("name", "codec", "options", "seeks"), CODECS, ids=lambda value: value if isinstance(value, str) else None
)
def test_seeking_and_decoding_everything_give_the_same_frames(tmp_path, name, codec, options, seeks, start):
    if codec not in av.codecs_available:
        pytest.skip(f"this build of PyAV has no encoder {codec}")
    path = write_video(tmp_path / name, 200, codec=codec, size=SIZE, pts=range(start, start + 800, 4), **options)
    every = read_frames(path, range(200))
    assert (by_key_frames(path, [190]) is not None) == seeks
    rng = np.random.default_rng(0)
    for _ in range(10):
        wanted = np.unique(rng.integers(0, 200, rng.integers(1, 5)))
        frames, positions = sample_frames(path, lambda total, wanted=wanted: wanted)
        assert torch.equal(frames[torch.from_numpy(positions)], every[torch.from_numpy(wanted)])


def packets(path):
    """Return the position and the size of each packet in a file."""
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def test_packets_without_a_frame(tmp_path):
    """Some packets of MPEG-4 part 2 repeat the last frame (vop_coded is 0). Only decoded frames are numbered."""
    path = write_video(tmp_path / "v.mp4", 200, codec="mpeg4", g=30, bf=0)
    data = bytearray(path.read_bytes())
    for position, _ in packets(path)[35:38] + packets(path)[41:46]:
        head = int.from_bytes(data[position : position + 8], "big")
        assert head >> 32 == 0x1B6  # start code of a picture
        bit = 29  # after 2 bits of picture type
        while head >> bit & 1:  # seconds: ones up to a zero
            bit -= 1
        bit -= 10  # the zero, and 7 bits of time between two ones
        assert head >> bit & 1
        data[position : position + 8] = (head & ~(1 << bit)).to_bytes(8, "big")
    path.write_bytes(data)
    assert decode.verify(path) == 192
    every = read_frames(path, range(192))
    for wanted in ([130], [5, 130], [20, 40, 191]):
        frames, _ = sample_frames(path, lambda total, wanted=wanted: np.array(wanted))
        assert torch.equal(frames, every[wanted])


def test_frames_that_only_the_container_marks_as_key_frames(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", 200, codec="mpeg4", g=30)
    every = read_frames(path, range(200))
    seekable = {*frame_index.SEEKABLE, ("mov,mp4,m4a,3gp,3g2,mj2", "mpeg4")}  # a codec whose decoder accepts any start
    monkeypatch.setattr(frame_index, "SEEKABLE", seekable)
    assert by_key_frames(path, [100]) is not None
    path.write_bytes(path.read_bytes().replace(b"stss", b"free"))  # without the table of key frames, all frames are marked
    frames, _ = sample_frames(path, lambda total: np.array([100, 190]))
    assert torch.equal(frames, every[[100, 190]])


def test_a_file_without_seeking_is_decoded_from_the_start(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", 200, codec="libx264", g=30)
    every = read_frames(path, range(200))
    open_ = decode.open_video

    class NoSeek:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def seek(self, *args, **kwargs):
            raise av.error.PermissionError(1, "no")

    @contextmanager
    def opened(path):
        with open_(path) as (container, stream):
            yield NoSeek(container), stream

    monkeypatch.setattr(decode, "open_video", opened)
    frames, _ = sample_frames(path, lambda total: np.array([150]))
    assert torch.equal(frames, every[[150]])


def test_damage_is_found_only_in_the_decoded_part(tmp_path):
    path = write_video(tmp_path / "v.mp4", 200, codec="libx264", g=30, sc_threshold=0, bf=0)
    data = bytearray(path.read_bytes())
    for position, size in packets(path)[65:75]:
        data[position + 8 : position + size] = bytes(size - 8)
    every = read_frames(path, range(200))
    path.write_bytes(data)
    with pytest.raises(VideoError, match=r"v\.mp4: damaged"):
        decode.verify(path)
    assert torch.equal(read_frames(path, [3]), every[[3]])
    frames, _ = sample_frames(path, lambda total: np.array([5, 130]))
    assert torch.equal(frames, every[[5, 130]])
    for wanted in ([78], [5, 70, 130]):  # key frames are at 64 and 80
        with pytest.raises(VideoError, match="damaged"):
            sample_frames(path, lambda total, wanted=wanted: np.array(wanted))


def num_decoded(path, wanted, monkeypatch):
    """Return how many frames are decoded in order to read the frames `wanted`."""
    decoded, decode_all = [], decode.decode_all
    with monkeypatch.context() as patch:
        patch.setattr(decode, "decode_all", lambda *args: (decoded.append(each) or each for each in decode_all(*args)))
        frames, positions = sample_frames(path, lambda total: np.array(wanted))
    assert [number(frames[i]) for i in positions] == wanted
    return len(decoded)


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
def test_seeking_skips_frames(tmp_path, monkeypatch, name):
    path = write_video(tmp_path / name, 240, codec="libx264", g=40, sc_threshold=0)
    assert num_decoded(path, [3, 5], monkeypatch) == 6
    assert num_decoded(path, [3, 150], monkeypatch) < 4 + 50
    assert num_decoded(path, [201], monkeypatch) < 50
    assert num_decoded(path, [5, 23], monkeypatch) == 24  # too close for a seek


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
@pytest.mark.parametrize("open_gop", [0, 1])
def test_a_seek_ends_at_the_nearest_key_frame(tmp_path, monkeypatch, name, open_gop):
    params = f"keyint=40:min-keyint=40:scenecut=0:bframes=3:b-adapt=0:open-gop={open_gop}"
    path = write_video(tmp_path / name, 240, codec="libx264", x264_params=params)
    with decode.open_video(path) as (container, stream):
        keys = decode.read_index(container, stream).key_frames
    assert len(keys) > 5
    for key in keys[1:]:
        assert num_decoded(path, [key], monkeypatch) <= 1 + 3 * open_gop  # B-frames of an open GOP come before its key frame


def test_distant_frames_are_located_by_key_frames(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", 300, codec="libx264", g=50, sc_threshold=0)
    every = read_frames(path, range(300))
    indexed, read_index = [], decode.read_index
    monkeypatch.setattr(decode, "read_index", lambda *args: indexed.append(args) or read_index(*args))
    assert torch.equal(read_frames(path, [280, 3]), every[[280, 3]])
    assert len(indexed) == 1
    assert torch.equal(read_frames(path, [3, 100]), every[[3, 100]])
    assert len(indexed) == 1
    with pytest.raises(IndexError, match="frame 400.* 300 frames"):
        read_frames(path, [400])


def test_counting_stores_no_packets(tmp_path):
    """The packets of a video are as large as the file."""
    path = write_video(tmp_path / "v.mkv", 3, codec="libx264")

    class Packet:
        alive = peak = 0
        size, is_discard, is_corrupt, dts = 1, False, False, None

        def __init__(self, pts):
            self.pts, self.is_keyframe = pts, pts % 10 == 0
            Packet.alive += 1
            Packet.peak = max(Packet.peak, Packet.alive)

        def __del__(self):
            Packet.alive -= 1

    container = SimpleNamespace(demux=lambda _: (Packet(i) for i in range(100)), format=SimpleNamespace(name="matroska,webm"))
    with decode.open_video(path) as (_, stream):
        index = decode.read_index(container, stream)
    assert (index.num_frames, len(index.key_frames)) == (100, 10)
    assert Packet.peak <= 2


def test_unexpected_frames_are_decoded_from_the_start(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", 200, codec="libx264", g=20)
    read_index = decode.read_index

    def wrong(container, stream):
        index = read_index(container, stream)
        return replace(index, pts=index.pts + (np.arange(200) >= 159))

    monkeypatch.setattr(decode, "read_index", wrong)
    assert num_decoded(path, [2, 160], monkeypatch) > 161  # first from the key frame, then from the start


def test_no_frames_are_decoded_for_no_indices(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", 5)
    assert [number(f) for f in decode.iter_frames(path, indices=[3])] == [3]
    monkeypatch.delattr(decode, "decode_all")
    assert not list(decode.iter_frames(path, indices=[]))


def test_short_side_resizes_while_reading(tmp_path):
    path = write_video(tmp_path / "v.mp4", 5)
    assert torch.equal(read_frames(path, [1, 4], short_side=20), resize_short_side(read_frames(path, [1, 4]), 20))


@pytest.mark.parametrize("short_side", [None, 20])
@pytest.mark.parametrize("indices", [[3], [0, 1, 2, 3], range(9), [2, 2, 8, 5]])
def test_frames_are_uploaded_in_batches(tmp_path, monkeypatch, short_side, indices):
    path = write_video(tmp_path / "v.mp4", 9)
    expected = read_frames(path, indices, short_side=short_side)
    monkeypatch.setitem(decode.UPLOAD_BYTES, "cpu", 3 * expected[0].numel() if short_side is None else 60_000)
    assert torch.equal(read_frames(path, indices, short_side=short_side), expected)
    with pytest.raises(IndexError, match="frame 9.* 9 frames"):
        read_frames(path, [0, 9], short_side=short_side)


def test_the_larger_of_two_video_streams(tmp_path):
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as out:
        streams = [add_stream(out, "mpeg4", "yuv420p", size, {}) for size in ((64, 48), (256, 96))]
        for i in range(6):
            for stream, size in zip(streams, ((64, 48), (256, 96)), strict=True):
                image = av.VideoFrame.from_ndarray(frame(i, *size), format="rgb24")
                image.pts, image.time_base = 4 * i, stream.codec_context.time_base
                out.mux(stream.encode(image))
        for stream in streams:
            out.mux(stream.encode(None))
    info = probe(path)
    assert (info.num_frames, info.width, info.height) == (6, 256, 96)
    assert number(read_frames(path, [5])[0]) == 5


@pytest.mark.parametrize(("rotation", "turns"), [(0, 0), (90, 1), (-90, 3), (180, 2), (-180, 2)])
def test_rotation_is_counter_clockwise_degrees(rotation, turns):
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    stored = SimpleNamespace(rotation=rotation, to_ndarray=lambda: image)
    reformatter = SimpleNamespace(reformat=lambda frame, width, height, form, **_: {(6, 4, "rgb24"): frame}[width, height, form])
    assert np.array_equal(containers.to_rgb("v.mp4", reformatter, stored, (6, 4)), np.rot90(image, turns))


def test_a_change_of_the_picture_size(tmp_path):
    """All frames get the size of the first one."""
    parts = []
    for size in ((64, 48), (128, 96)):
        with av.open(tmp_path / f"{size}.ts", "w") as out:
            stream = add_stream(out, "libx264", "yuv420p", size, {})
            for i in range(6):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(frame(i, *size), format="rgb24")))
            out.mux(stream.encode(None))
        parts.append((tmp_path / f"{size}.ts").read_bytes())
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    total = decode.verify(tmp_path / "both.ts")
    assert total > 6
    frames = read_frames(tmp_path / "both.ts", [0, total - 1])
    assert frames.shape == (2, 3, 48, 64)
    assert number(frames[1]) == 5


def test_parallel_reads_use_one_decoder_thread_each(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", 3)

    def threads(_=None):
        with decode.open_video(path) as (_, stream):
            return stream.codec_context.thread_count

    assert threads() == 0  # one for each core
    assert list(read_ahead(threads, range(4), workers=2)) == [1] * 4
    assert list(read_ahead(threads, range(2), workers=1)) == [0] * 2
    assert threads() == 0
    monkeypatch.setattr(containers, "get_worker_info", object)  # a loader worker
    assert threads() == 1


@pytest.mark.parametrize("name", ["a b.mp4", "a:b 100%d.mp4", "видео-動画.mp4", "http:x.mp4", "-v.mp4"])
def test_any_file_name(tmp_path, name, monkeypatch):
    write_video(tmp_path / name, 3)
    assert probe(tmp_path / name).num_frames == 3
    monkeypatch.chdir(tmp_path)
    assert probe(name).num_frames == 3


def test_index_past_the_end(tmp_path):
    path = write_video(tmp_path / "v.mp4", 5)
    with pytest.raises(IndexError, match=r"v\.mp4: .*frame 9.* 5 frames"):
        read_frames(path, [2, 9])
    for bad in ([-1], [], [[1, 2]]):
        with pytest.raises(ValueError, match="indices must be"):
            read_frames(path, bad)


@pytest.fixture(scope="module")
def broken_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    write_video(folder / "good.mp4", 30, codec="libx264")
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("This is a text, not a video.\n" * 100)
    (folder / "page.mp4").write_text("<!DOCTYPE html><html>" + "x" * 10000)
    (folder / "truncated.mp4").write_bytes((folder / "good.mp4").read_bytes()[:1500])
    (folder / "list.mp4").write_text(f"ffconcat version 1.0\nfile {folder / 'good.mp4'}\n")
    (folder / "playlist.m3u8").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
    )
    (folder / "subtitles.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nhello\n")
    os.mkfifo(folder / "fifo.mp4")
    with av.open(str(folder / "sound.wav"), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.rate = 8000
        out.mux(stream.encode(sound))
    return folder


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_number_of_frames_in_the_header(tmp_path, suffix):
    """Matroska states the duration only."""
    fps, count = decode.header(write_video(tmp_path / f"v{suffix}", num_frames=60))
    assert fps == pytest.approx(25)
    assert count == pytest.approx(60, abs=2)


READERS = {
    "probe": probe,
    "header": decode.header,
    "read_frames": lambda path: read_frames(path, [0]),
    "sample_frames": lambda path: sample_frames(path, lambda total: np.arange(1)),
    "iter_frames": lambda path: next(decode.iter_frames(path)),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("empty.mp4", "empty"),
        ("text.mp4", "not a video"),
        ("page.mp4", "not a video"),
        ("truncated.mp4", "no video stream|not a video"),
        ("list.mp4", "concat playlist, not a video"),
        ("playlist.m3u8", "HLS playlist, not a video"),
        ("subtitles.srt", "not a video"),
        ("sound.wav", "not a video"),
        ("fifo.mp4", "not a regular file"),
    ],
)
def test_files_that_are_not_videos(broken_files, name, says, read):
    with pytest.raises(VideoError, match=says) as error:
        read(broken_files / name)
    assert str(error.value).startswith(str(broken_files / name))


def test_a_url_is_no_file():
    for url in ("https://example.org/a.mp4", Path("https://example.org/a.mp4")):
        with pytest.raises(FileNotFoundError, match="https://example.org/a.mp4 is a URL"):
            probe(url)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_missing_file_and_folder(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="nowhere.mp4"):
        read(tmp_path / "nowhere.mp4")
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        read(tmp_path)


def test_file_without_permission():
    """Root can read every file, so if the tests run as root, this one switches to another user."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = write_video(Path(folder, "secret.mp4"), 3)
        path.chmod(0)
        if user == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(PermissionError) as error:
                probe(path)
        finally:
            os.seteuid(user)
    assert error.value.filename == str(path)


@pytest.mark.slow
def test_closing_a_decoder_does_not_deadlock(tmp_path):
    """The program, or an older torchvision, makes FFmpeg's threads log through Python, which needs the interpreter lock."""
    write_dataset(tmp_path, 1, seed=0, num_frames=34)
    script = """
import faulthandler, pathlib
faulthandler.dump_traceback_later(60, exit=True)
import av.logging
av.logging.set_level(av.logging.ERROR)
from tpn.video import decode
from tpn.video.ahead import read_ahead
files = sorted(pathlib.Path().rglob("*.mp4"))
for _ in range(12):
    for file in files:
        decode.probe(file)
print(len(files))
"""
    output, _ = run_python(script, tmp_path)
    assert output == "14\n"
