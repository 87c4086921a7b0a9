"""Videos whose packets do not number their frames: counts are the decoder's, and a file and its frames give the same clips."""

from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from odd_videos import CLIPS, N, field_pairs
from videos import number, write_video

from tpn import InputSpec
from tpn.video import containers, decode
from tpn.video.sources import read_clips

SPEC = InputSpec(num_frames=4, frame_interval=3, short_side=32, crop_size=32, num_clips=5, num_crops=1)
SPECS = {
    "views over the whole video": SPEC,
    "one clip": replace(SPEC, num_clips=1),
    "longer than the video": replace(SPEC, num_frames=16, num_clips=2),
    "segments": replace(SPEC, sampling="segments", num_clips=2),
}


@pytest.fixture
def decoded(monkeypatch):
    """The number of each frame that is decoded, also in a second pass."""
    numbers, decode_all = [], decode.decode_all
    for module in (decode, containers):
        monkeypatch.setattr(module, "decode_all", lambda *args: (numbers.append(f.pts) or f for f in decode_all(*args)))
    return numbers


@pytest.mark.parametrize("kind", CLIPS)
def test_file_and_array_give_the_same_clips_in_one_decode(tmp_path, kind, decoded):
    name, write = CLIPS[kind]
    path = write(tmp_path / name)
    every = torch.stack(list(decode.iter_frames(path)))
    total = len(every)
    assert total > 5
    assert decode.verify(path) == decode.probe(path).num_frames == total
    assert torch.equal(decode.read_frames(path, [total - 1, 2]), every[[total - 1, 2]])
    with pytest.raises(IndexError, match=f"frame {total}.* {total} frames"):
        decode.read_frames(path, [total])
    for spec in SPECS.values():
        decoded.clear()
        frames, clips = read_clips(path, replace(spec, short_side=every.shape[2]), torch.device("cpu"))
        assert len(decoded) <= total
        of_array, clips_of_array = read_clips(every.numpy(), spec, torch.device("cpu"))
        assert torch.equal(frames[clips], of_array[clips_of_array])


def test_the_makers_give_what_they_say(tmp_path):
    """Otherwise the test above would show little."""

    def num_packets(kind):
        name, write = CLIPS[kind]
        with av.open(str(write(tmp_path / name))) as container:
            sizes = [packet.size for packet in container.demux(video=0) if packet.size]
        return len(sizes), sizes.count(1)

    assert num_packets("xvid") == (N + 3, 3)
    assert num_packets("xvid, delayed") == (N + 1, 1)
    assert num_packets("packed B-frames") == (N, 0)
    assert num_packets("pictures that are not coded") == (N + 4, 0)
    assert num_packets("pictures that are not shown") == (N, 0)
    assert decode.probe(tmp_path / "v.webm").num_frames == N - 3


@pytest.mark.skipif(containers.PYAV < (16, 0), reason="earlier versions write a header of their own when they copy a stream")
@pytest.mark.parametrize("name", ["v.mkv", "v.mp4", "v.ts"])
def test_two_packets_for_each_frame(tmp_path, name):
    """Fields of H.264. The count is known after a decode, so a second one may follow."""
    path = field_pairs(tmp_path / name)
    assert decode.probe(path).num_frames == decode.verify(path) == 12
    for sample in (np.arange, lambda total: np.array([total - 1]), lambda total: np.array([total // 2])):
        frames, positions = decode.sample_frames(path, sample)
        assert [number(frames[i]) for i in positions] == sample(12).tolist()
    frames, _ = decode.sample_frames(path, np.arange, start=0.08, end=0.17)
    assert [number(frame) for frame in frames] == [2, 3, 4]


@pytest.mark.parametrize("options", [{}, {"x264_params": "cqm=jvt"}, {"tune": "zerolatency"}, {"preset": "ultrafast"}])
def test_ordinary_files_are_not_decoded_to_the_end(tmp_path, decoded, options):
    path = write_video(tmp_path / "v.mp4", N, codec="libx264", **options)
    decode.sample_frames(path, lambda total: np.array([0, 4]))
    assert len(decoded) == 5
    decode.probe(path)
    assert len(decoded) == 6
