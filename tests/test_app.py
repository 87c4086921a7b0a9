"""`examples/app.py`, the web page."""

import importlib.util
import json
import shutil
import urllib.request

import pytest
from scripts import example
from videos import write_video

import tpn
from tpn.video import motion

pytestmark = [
    pytest.mark.slow,  # .ci/run installs Gradio for the slow tests
    pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason='needs pip install -e ".[app]"'),
]
TINY = "tpn_slowonly_tiny_motion"


@pytest.fixture(scope="module")
def app():
    return example("app")


def error_of(call, *args):
    """The message that a visitor reads, without a traceback in the server's log."""
    import gradio  # takes seconds

    with pytest.raises(gradio.Error) as caught:
        call(*args)
    assert not caught.value.print_exception
    return caught.value.message


def test_bundled_model(app, motions):
    labels, timeline = app.classify(str(motions / "both.mp4"), TINY)
    assert len(labels) == 5
    assert set(labels) == set(timeline["class"]) < set(motion.CLASSES)
    curve = timeline[timeline["class"] == max(labels, key=labels.get)]
    assert curve["probability"].mean() == pytest.approx(max(labels.values()), rel=1e-5)
    assert 2 < len(curve) <= app.MAX_CLIPS
    assert curve["time, s"].is_monotonic_increasing
    assert len(app.draw_explanation(str(motions / "both.mp4"), TINY).getcolors(1 << 24)) > 100


@pytest.mark.parametrize("name", ["video.mp4", "día ☃.mp4"])
def test_damaged_video(app, tmp_path, name):
    path = write_video(tmp_path / name, 20)
    path.write_bytes(path.read_bytes()[:500])
    for function in (app.classify, app.draw_explanation):
        message = error_of(function, str(path), TINY)
        assert message.startswith(f"{name}: ")
        assert str(tmp_path) not in message


def test_limits(app, tmp_path, monkeypatch):
    path = str(write_video(tmp_path / "video.mp4", 12))
    message = error_of(app.classify, path, TINY)
    assert "12" in message
    assert "16" in message
    monkeypatch.setattr(app, "MAX_FRAMES", 11)  # already before the model is loaded
    monkeypatch.setattr(app, "load", None)
    message = error_of(app.classify, path, TINY)
    assert "12" in message
    assert "11" in message
    monkeypatch.setattr(app, "MAX_FRAMES", 12)
    monkeypatch.setattr(app, "MAX_SIDE", 100)
    assert "128x48" in error_of(app.classify, path, TINY)


def test_no_video(app):
    assert "no video" in error_of(app.classify, None, TINY)
    assert "gone.mp4" in error_of(app.classify, "folder/gone.mp4", TINY)


def test_segment_model_has_no_timeline(app, tmp_path, monkeypatch):
    model = tpn.create_model("tpn_tsm_r50_sthv1", base_channels=4)
    monkeypatch.setattr(app, "load", lambda name: tpn.VideoClassifier(model))
    with pytest.warns(UserWarning, match="timeline"):  # Gradio's, outside of a request
        labels, timeline = app.classify(str(write_video(tmp_path / "video.mp4", 12)), "any")
    assert len(labels) == 5
    assert timeline is None


def test_weights_that_cannot_be_fetched(app, motions, monkeypatch):
    def load(name):
        raise tpn.WeightsUnavailableError("no network")

    monkeypatch.setattr(app, "load", load)
    assert error_of(app.classify, str(motions / "both.mp4"), TINY) == "no network"


@pytest.fixture(scope="module")
def client(app):
    from gradio_client import Client

    _, url, _ = app.demo.queue().launch(prevent_thread_lock=True, quiet=True)
    yield Client(url, verbose=False, analytics_enabled=False)
    app.demo.close()


def test_served(client, app, motions, tmp_path):
    from gradio_client import handle_file

    labels, timeline = client.predict(handle_file(motions / "both.mp4"), TINY, api_name="/classify")
    assert labels["label"] in motion.CLASSES
    assert timeline["columns"] == ["time, s", "class", "probability"]
    path = tmp_path / "text.mp4"
    path.write_text("no video")
    with pytest.raises(Exception, match=r"text\.mp4: not a video"):
        client.predict(handle_file(path), TINY, api_name="/classify")
    with pytest.raises(Exception, match="not in the list of choices"):
        client.predict(handle_file(motions / "both.mp4"), f"local-dir:{tmp_path}", api_name="/classify")


def test_serves_and_reads_no_other_files(client, motions, tmp_path):
    path = shutil.copy(motions / "both.mp4", tmp_path)
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{client.src}gradio_api/file={path}")
    video = {"path": path, "meta": {"_type": "gradio.FileData"}}
    request = urllib.request.Request(
        f"{client.src}gradio_api/call/classify",
        json.dumps({"data": [video, TINY]}).encode(),
        {"Content-Type": "application/json"},
    )
    event = json.load(urllib.request.urlopen(request))["event_id"]
    assert b"event: error" in urllib.request.urlopen(f"{client.src}gradio_api/call/classify/{event}").read()
