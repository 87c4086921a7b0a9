"""Videos whose packets do not number their frames, with what FFmpeg's encoders give and changes of a few bytes."""

import struct
from fractions import Fraction

import av
import h264_fields
from videos import HEIGHT, WIDTH, frame, write_video

N = 40
FRAGMENTS = "frag_keyframe+empty_moov"
"""Value of `movflags` for an MP4 file in fragments."""

PICTURE = b"\0\0\1\xb6"
"""Start code of a picture in MPEG-4 part 2."""


def encode_mpeg4(num_frames=N, **options):
    """The packets of numbered frames, in the order of the decoder."""
    encoder = av.CodecContext.create("mpeg4", "w")
    encoder.width, encoder.height, encoder.pix_fmt = WIDTH, HEIGHT, "yuv420p"
    encoder.time_base, encoder.framerate = Fraction(1, 25), Fraction(25)
    encoder.options = {"g": "12", **{key: str(value) for key, value in options.items()}}
    packets = []
    for i in range(num_frames):
        image = av.VideoFrame.from_ndarray(frame(i), format="rgb24").reformat(format="yuv420p")
        image.pts = i
        packets += encoder.encode(image)
    return [bytes(packet) for packet in [*packets, *encoder.encode(None)]]


def write_packets(path, packets, codec="mpeg4", rate=25, size=(WIDTH, HEIGHT)):
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for i, data in enumerate(packets):
            packet = av.Packet(data)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, i, i, Fraction(1, rate)
            packet.is_keyframe = i == 0
            out.mux(packet)
    path.write_bytes(path.read_bytes().replace(b"FMP4", b"XVID"))
    return path


def sign(packets, name):
    """Name the encoder in the first packet; FFmpeg's decoder treats the streams of some encoders differently."""
    before, _, after = packets[0].partition(PICTURE)
    return [before + b"\0\0\1\xb2" + name + PICTURE + after, *packets[1:]]


def xvid(path):
    """One-byte packets where there is nothing new."""
    packets = sign(encode_mpeg4(bf=0), b"XviD0046")
    nothing = [b"\x7f"]
    return write_packets(path, packets[:10] + nothing + packets[10:20] + 2 * nothing + packets[20:])


def xvid_delayed(path):
    """A one-byte packet in place of the frame by which B-frames are late."""
    packets = sign(encode_mpeg4(bf=2, b_strategy=0), b"XviD0046")
    return write_packets(path, [packets[0], b"\x7f", *packets[1:]])


def packed(path):
    """Each B-frame in the packet of the picture before it, and a packet with an empty picture in its place."""
    packets = []
    for packet in encode_mpeg4(bf=1, b_strategy=0):
        if packet[packet.index(PICTURE) + 4] >> 6 == 2:
            packets[-1] += packet
            packets.append(PICTURE + bytes([0b01010000, 0b01001111]))
        else:
            packets.append(packet)
    return write_packets(path, sign(packets, b"DivX503b1393p"))


def not_coded(path):
    """Empty pictures among the others."""
    packets = encode_mpeg4(bf=0)
    for at in (30, 20, 20, 5):
        packets.insert(at, PICTURE + bytes([0b01010000, 0b01001111]))
    return write_packets(path, packets)


def hidden(path):
    """Pictures of VP8 that later ones refer to, but that are not shown."""
    data = write_video(path, N, codec="libvpx", deadline="realtime").read_bytes()
    with av.open(str(path)) as container:
        pictures = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    for number in (5, 20, 21):
        assert data.count(pictures[number]) == 1
        data = data.replace(pictures[number], bytes([pictures[number][0] & ~16]) + pictures[number][1:])
    path.write_bytes(data)
    return path


def edited(path, start, length, **options):
    """An edit list that shows only a part of the video, in frames."""
    data = bytearray(write_video(path, N, **options).read_bytes())
    at = data.index(b"elst") + 4
    count, _, media_start = struct.unpack(">IIi", data[at + 4 : at + 16])
    assert count == 1
    data[at + 8 : at + 16] = struct.pack(">Ii", 40 * length, media_start + 512 * start)
    path.write_bytes(data)
    return path


def field_pairs(path, num_frames=12):
    images = [frame(i, WIDTH, 64)[..., 0] for i in range(num_frames)]
    source = path.with_suffix(".h264")
    source.write_bytes(b"".join(h264_fields.packets(images)))
    with av.open(str(source)) as container, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(container.streams.video[0])
        for i, data in enumerate(h264_fields.packets(images)):
            packet = av.Packet(data)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, i, i, Fraction(1, 50)
            packet.is_keyframe = i == 0
            out.mux(packet)
    return path


def truncated(path, part, **options):
    data = write_video(path, N, **options).read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    return path


def cut(path, unit, **options):
    """The second half of a file, in whole units of the format: its first pictures refer to what is missing."""
    data = write_video(path, 2 * N, **options).read_bytes()
    path.write_bytes(data[len(data) // 2 // unit * unit :])
    return path


CLIPS = {
    "xvid": ("v.avi", xvid),
    "xvid, delayed": ("v.avi", xvid_delayed),
    "packed B-frames": ("v.avi", packed),
    "pictures that are not coded": ("v.avi", not_coded),
    "pictures that are not shown": (
        "v.webm",
        hidden,
    ),
    "variable rate, avi": ("v.avi", lambda p: write_video(p, N, pts=[4 * i + 8 * (i // 7) for i in range(N)])),
    "variable rate, mkv": ("v.mkv", lambda p: write_video(p, N, codec="libx264", pts=[i * i + i for i in range(N)])),
    "variable rate, mp4": ("v.mp4", lambda p: write_video(p, N, codec="libx264", pts=[7 * i - 3 * (i % 2) for i in range(N)])),
    "edited at the start": ("v.mp4", lambda p: edited(p, 17, N - 17, codec="libx264", g=12, bf=2)),
    "edited at the end": ("v.mp4", lambda p: edited(p, 0, 15, codec="libx264", g=12, bf=2)),
    "edited, mpeg4": ("v.mp4", lambda p: edited(p, 5, 20, codec="mpeg4", g=12, bf=2)),
    "interlaced, mp4": ("v.mp4", lambda p: write_video(p, N, codec="libx264", size=(WIDTH, 64), x264_params="tff=1")),
    "interlaced, ts": ("v.ts", lambda p: write_video(p, N, codec="mpeg2video", size=(WIDTH, 64), flags="+ildct+ilme", bf=2)),
    "truncated, avi": ("v.avi", lambda p: truncated(p, 0.6, codec="mjpeg", pix_fmt="yuvj420p")),
    "truncated, ts": ("v.ts", lambda p: truncated(p, 0.6, codec="libx264", g=12)),
    "truncated, mkv": ("v.mkv", lambda p: truncated(p, 0.6, codec="libx264", g=12)),
    "cut, mpeg2 ts": ("v.ts", lambda p: cut(p, 188, codec="mpeg2video", g=12, bf=2)),
    "cut, mpeg2": ("v.mpg", lambda p: cut(p, 2048, codec="mpeg2video", g=12, bf=2)),
    "cut, h264": ("v.ts", lambda p: cut(p, 188, codec="libx264", g=12, bf=2, x264_params="open-gop=1:scenecut=0")),
    "transport stream": ("v.ts", lambda p: write_video(p, N, codec="libx264", g=12, bf=2)),
    "flash": ("v.flv", lambda p: write_video(p, N, codec="flv")),
    "wmv": ("v.wmv", lambda p: write_video(p, N, codec="wmv2")),
    "gif": ("v.gif", lambda p: write_video(p, N, codec="gif", pix_fmt="rgb8")),
}
"""Name and writer of each video."""
