"""The functions that read video files, for tests that each of them must pass."""

import numpy as np
import pytest

from tpn.video import decode

READERS = {
    "probe": decode.probe,
    "header": decode.header,
    "verify": decode.verify,
    "iter_frames": lambda path: sum(1 for _ in decode.iter_frames(path)),
    "read_frames": lambda path: decode.read_frames(path, [0]),
    "sample_frames": lambda path: decode.sample_frames(path, lambda total: np.linspace(0, total - 1, 4).astype(np.int64)),
    "segment": lambda path: decode.sample_frames(path, np.arange, start=0.1, end=0.5),
}

each_reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS)
