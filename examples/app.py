"""Classify an uploaded video on a web page: its classes, its timeline, and an explanation.

    pip install ".[app]"
    python examples/app.py

On Hugging Face: create a Space with the SDK Gradio, upload this file, and add a `requirements.txt` with the line `tpn[app]`. The
bundled model needs no GPU.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # Gradio reads it during the import

import gradio as gr
import pandas as pd
from PIL import Image

import tpn
from tpn import tempo
from tpn.cli.script import one_line_message
from tpn.demo import render_video
from tpn.explain import explain
from tpn.video import decode

MODELS = ["tpn_slowonly_tiny_motion", "tpn_slowonly_r50_k400", "tpn_tsm_r50_sthv1"]
"""Models whose weights need no manual download. The first one ships with tpn. Add your own as "hf-hub:OWNER/NAME"."""
MAX_FILE_SIZE, MAX_FRAMES, MAX_SIDE, MAX_CLIPS = "100 MB", 3600, 4096, 60
ABOUT = f"""# What happens in this video?
[tpn](https://github.com/org/tpn) names actions, and shows when and where they happen.
`{MODELS[0]}` recognizes 14 rendered motions, as in the example. The other models recognize actions in real videos.
The limits are {MAX_FRAMES:,} frames and {MAX_FILE_SIZE}.
"""
load = lru_cache(maxsize=1)(tpn.VideoClassifier)


@contextmanager
def opened(video: str | None, model: str) -> Iterator[tuple[tpn.VideoClassifier, decode.VideoInfo]]:
    """Yield a classifier for a video within the limits, and show the errors that a visitor can cause."""
    try:
        if video is None:
            raise ValueError("no video; upload one, or click the example")
        info = decode.probe(video)
        if info.num_frames > MAX_FRAMES or max(info.width, info.height) > MAX_SIDE:
            got = f"{info.num_frames:,} frames of {info.width}x{info.height} pixels"
            raise ValueError(f"the video has {got}; upload at most {MAX_FRAMES:,} frames of {MAX_SIDE}x{MAX_SIDE}")
        if info.fps is None:
            raise ValueError(f"{video}: the file does not state its frame rate")
        classifier = load(model)
        if info.num_frames < (least := classifier.spec.num_frames):
            raise ValueError(f"the video has {info.num_frames} frames; upload at least {least} for this model")
        yield classifier, info
    except (decode.VideoError, OSError, ValueError, tpn.WeightsUnavailableError) as error:
        message = one_line_message(error).replace(str(video), Path(str(video)).name)  # not the folders of the server
        raise gr.Error(message, print_exception=False) from error


def classify(video: str | None, model: str) -> tuple[dict[str, float], pd.DataFrame | None]:
    """Return the most probable classes, and their probabilities along time."""
    with opened(video, model) as (classifier, info):
        if classifier.spec.sampling == "segments":
            gr.Warning("This model samples segments of the whole video, so there is no timeline.")
            return dict(classifier(video, num_crops=1).top(5)), None
        stride = max(classifier.spec.clip_span // 4, -(-info.num_frames // MAX_CLIPS))
        times, probs = tempo.curves(tempo.slide(classifier, video, stride=stride), fps=info.fps)
        best = {classifier.labels[k]: probs[:, k] for k in (-probs.mean(axis=0)).argsort()[:5]}
        timeline = pd.DataFrame({"time, s": times} | best).melt("time, s", var_name="class", value_name="probability")
        return {name: float(values.mean()) for name, values in best.items()}, timeline


def draw_explanation(video: str | None, model: str) -> Image.Image:
    with opened(video, model) as (classifier, _), tempfile.TemporaryDirectory() as folder:
        explain(classifier, video).save_png(path := Path(folder, "explanation.png"))
        return Image.open(path).convert("RGB")


with gr.Blocks(title="tpn", delete_cache=(600, 3600)) as demo:  # files of visitors are deleted after an hour
    gr.Markdown(ABOUT)
    with gr.Row():
        with gr.Column():
            video = gr.Video(label="Video", sources=["upload"], height=320)
            with tempfile.TemporaryDirectory() as folder:  # Gradio copies the example
                render_video(example := Path(folder, "motions.mp4"))
                gr.Examples([str(example)], video, label="Example")
            inputs = [video, gr.Dropdown(MODELS, label="Model")]
            button = gr.Button("Classify", variant="primary")
        labels = gr.Label(label="Classes")
    timeline = gr.LinePlot(x="time, s", y="probability", color="class", y_lim=[0, 1], label="When")
    gr.Markdown("**Where**: bright parts are evidence for the most probable class of a clip from the middle of the video.")
    regions = gr.Image(label="Where", show_label=False, buttons=["fullscreen", "download"])
    limits = {"concurrency_limit": 1, "concurrency_id": "model"}
    button.click(classify, inputs, [labels, timeline], **limits).success(draw_explanation, inputs, regions, **limits)

if __name__ == "__main__":
    demo.queue(max_size=20).launch(max_file_size=MAX_FILE_SIZE, theme=gr.themes.Default(font=["system-ui", "sans-serif"]))
