"""No test reaches the internet: the client's Hub is a loopback server, set before the client is imported."""

import atexit
import os
import tempfile

import pytest
from servers import Hub, Server

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: one thread for each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

HUB = Hub()
HOME = tempfile.TemporaryDirectory(prefix="tpn-tests-")
atexit.register(HOME.cleanup)
for variable in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_ASSETS_CACHE", "TPN_CACHE", "TPN_HUB_NAMESPACE"):
    os.environ.pop(variable, None)
os.environ |= {
    "HF_ENDPOINT": HUB.url,
    "HF_HOME": HOME.name,
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "NO_PROXY": "127.0.0.1",
    "RAY_worker_niceness": "0",  # with Ray's own, low priority, its processes get nothing done beside other tests
}


os.fsync = lambda file: None  # no test cuts the power


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Let a process that is done take tests from another: `load` hands out the last ones by number, not by duration."""
    if config.getoption("dist") == "load":
        from xdist.scheduler import WorkStealingScheduling

        return WorkStealingScheduling(config, log)
    return None


@pytest.fixture
def hub():
    """The Hub, empty."""
    HUB.clear()
    yield HUB
    HUB.clear()


@pytest.fixture
def commit(hub, tmp_path):
    """Commit a model to "me/x", the same for the same label. Return the hash of the commit."""

    import torch

    import tpn

    def commit(label):
        torch.manual_seed(ord(label))
        model = tpn.create_model("tsm_r50_sthv2", base_channels=4, num_classes=1)
        model.labels = (label,)
        model.head.fc.bias.data.fill_(ord(label))
        folder = tpn.save_pretrained(model, tmp_path / "saved")
        return hub.add("me/x", weights=(folder / "model.safetensors").read_bytes(), config=(folder / "config.json").read_bytes())

    return commit


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """A folder with three classes of four short videos for training, and of two for validation."""
    from tpn.video import encode, motion

    root = tmp_path_factory.mktemp("motion") / "videos"
    for part, clips, seed in (("train", 4, 1), ("val", 2, 2)):
        for name in ("moving left", "turning clockwise", "blinking"):
            for i in range(clips):
                frames = motion.render(motion.CLASSES.index(name), tempo=2.0**i, seed=(seed, i), num_frames=34)
                encode.write_video(root / part / name / f"{i:06d}.mp4", frames, fps=motion.FPS)
    return root


@pytest.fixture
def server():
    """A file server, empty."""
    server = Server()
    yield server
    server.close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of weights. Failed requests are retried without a pause."""
    from tpn import hub
    from tpn.zoo import fetch

    monkeypatch.setattr(fetch, "PAUSES", (0.001,) * len(fetch.PAUSES))
    monkeypatch.setattr(hub, "PAUSES", (0.001,) * len(hub.PAUSES))
    monkeypatch.setenv("TPN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def published(server, monkeypatch):
    """Serve a narrow checkpoint from loopback instead of its direct link; return its entry."""
    import small

    return small.serve(server, small.SLOWONLY, monkeypatch.setattr)


@pytest.fixture(scope="session")
def classifier():
    """A classifier on the model that ships with tpn."""
    from tpn.predict import VideoClassifier

    return VideoClassifier("tpn_slowonly_tiny_motion", pretrained=True)


@pytest.fixture(scope="session")
def motions(tmp_path_factory):
    """A folder with a video of two motions, `both.mp4`, and its decoded frames, (T, 3, H, W), in `frames.npy`."""
    import two_motions

    return two_motions.write(tmp_path_factory.mktemp("both"))


@pytest.fixture
def one_thread():
    """One torch thread: small networks are faster, and sums do not depend on the number of cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
