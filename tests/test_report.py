"""The report of a run or an evaluation: what it shows, that every text in it is escaped, and that it needs nothing else."""

import base64
import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote_to_bytes, urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from videos import number, write_video

import tpn
from tpn.training.charts import HEIGHT, MAX_POINTS, Line, line_chart, thinned, ticks
from tpn.training.metrics import Evaluation
from tpn.training.plan import PlanLine
from tpn.training.report import MAX_MATRIX, MAX_MISTAKES, STRIP_FRAMES, find_mistakes, write_report
from tpn.video.datasets import Item, VideoFolder

NAMES = ["<img src=x onerror=alert(1)>", "a & \"b\" 'c' <style>", os.fsdecode(b"caf\xe9"), "tab\tand\nline"]
VOID = {"meta", "img", "line", "polyline"}


class Page(HTMLParser):
    """A parsed report: its elements as (tag, attributes), and the text of each element that was opened.

    Raises AssertionError if an element is not closed, or if another one is closed.
    """

    def __init__(self, path):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.texts.append("")
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.texts.append("")

    def handle_endtag(self, tag):
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data):
        for index in self.open:
            self.texts[index] += data

    def all(self, tag, kind=None):
        """The texts and attributes of all elements of a kind."""
        found = zip(self.elements, self.texts, strict=True)
        return [
            (text, values)
            for (name, values), text in found
            if name == tag and (kind is None or kind in (values.get("class") or "").split())
        ]

    def rows(self, heading):
        """The cells of the rows in the section with a heading."""
        (section,) = (part for part in self.source.split("<section>") if part.startswith(f"<h2>{heading}</h2>"))
        rows = re.findall("<tr>(.*?)</tr>", section, re.DOTALL)
        return [[re.sub("<.*?>", "", cell) for cell in re.findall("<t[dh].*?</t[dh]>", row)] for row in rows]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dataset of four classes with unusual names, with two numbered videos of 12 frames each."""
    root = tmp_path_factory.mktemp("data")
    for name in NAMES:
        (root / name).mkdir()
        for i in range(2):
            write_video(root / name / f"{i} #{name}.mp4", num_frames=12)
    return VideoFolder(root, tpn.InputSpec(num_frames=4), train=False)


def evaluation_of(probs, data=None, *, multi_label=False, classes=None, targets=None, items=None):
    return Evaluation(
        tuple(classes or data.classes),
        tuple(items or data.items),
        np.array(probs, np.float32),
        data.targets.numpy() if targets is None else np.array(targets, np.float32),
        views=3,
        multi_label=multi_label,
        failed={f"/videos/{NAMES[2]}.mp4": "the file is <empty>"},
    )


@pytest.fixture(scope="module")
def evaluation(data):
    """The second video of each class is taken for the next class, with probabilities of 0.9, 0.8, 0.7, 0.6.

    Loss: the mean of 4 x 0 and -log of 0.1, 0.2, 0.3, 0.4.
    """
    probs = np.zeros((8, 4))
    for k in range(4):
        probs[2 * k, k] = 1
        probs[2 * k + 1, (k + 1) % 4] = 0.9 - k / 10
        probs[2 * k + 1, k] = 0.1 + k / 10
    return evaluation_of(probs, data)


@pytest.fixture(scope="module")
def page(data, evaluation, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    plan = [PlanLine("frame_interval", 4, "spans <most> of a video"), PlanLine("crop_area", (0.3, 1.0), "given")]
    metrics = [{"step": step, "loss": 4 / step, "top1": 10.0 * step} for step in range(1, 10)]
    metrics += [{"step": 5, "loss": None}, {"step": 5, "val_top1": 40.0, "val_loss": 1.5}, {"step": 9, "val_top1": 60.0}]
    facts = {"Start": "from <random>", "Folder": f"/runs/{NAMES[2]}"}
    write_report(path, evaluation, data, title="Run of </title><script>", facts=facts, plan=plan, metrics=metrics)
    return Page(path)


def test_nothing_is_fetched_and_nothing_runs(page):
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in {"src", "href", "srcset", "data", "xlink:href"} & attributes.keys():
            assert attributes[name].startswith(("data:image/jpeg;base64,", "file:///"))
    assert not re.search(r"url\(|@import|https?:", page.source.partition("<body>")[0])
    (policy,) = (values["content"] for tag, values in page.elements if tag == "meta" and "http-equiv" in values)
    assert policy.startswith("default-src 'none';")


def test_names_are_escaped(page, data):
    shown = [NAMES[0], NAMES[1], "caf\\udce9", "tab\\tand\\nline"]
    assert sorted(row[0] for row in page.rows("Confusion matrix")[1:]) == sorted(
        name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;").replace("'", "&#x27;")
        for name in shown
    )
    heads = [text for text, _ in page.all("th")]
    assert all(heads.count(name) == 2 for name in shown)  # of a row, and of a column
    assert [text for text, _ in page.all("h1")] == ["Run of </title><script>"]
    assert [text for text, _ in page.all("dd")] == ["from <random>", "/runs/caf\\udce9"]
    assert page.rows("Unreadable videos")[1] == ["/videos/caf\\udce9.mp4", "the file is &lt;empty&gt;"]


def test_key_numbers(page):
    assert [text for text, _ in page.all("b")][:5] == ["50.0%", "50.0%", "0.754", "37.5%", "8"]


def test_plan_has_reasons(page):
    assert page.rows("Plan")[1:] == [["frame-interval", "4", "spans &lt;most&gt; of a video"], ["crop-area", "0.3, 1", "given"]]


def test_confusion_and_classes(page, data):
    cells = [row[1:] for row in page.rows("Confusion matrix")[1:]]
    assert cells == [["1" if (j - i) % 4 < 2 else "" for j in range(4)] for i in range(4)]
    assert len(page.all("td", "good")) == len(page.all("td", "bad")) == 4
    rows = page.rows("Classes")
    assert rows[0] == ["class", "videos", "accuracy", "", "most frequent error"]
    assert {(row[1], row[2]) for row in rows[1:]} == {("2", "50.0%")}
    assert all(row[4].endswith(" (1 video)") for row in rows[1:])


def test_every_mistake_has_its_strip_and_its_file(page, data):
    entries = re.findall(r"<li>.*?</li>", page.source, re.DOTALL)
    assert len(entries) == 4
    for k, (entry, probability) in enumerate(zip(entries, ("90.0%", "80.0%", "70.0%", "60.0%"), strict=True)):
        pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', entry)
        images = [Image.open(io.BytesIO(base64.b64decode(picture))) for picture in pictures]
        numbers = [number(torch.from_numpy(np.array(image.resize((128, 48)))).permute(2, 0, 1)) for image in images]
        assert numbers == [1, 3, 5, 7, 9, 11]
        labels = [text for text in re.sub("<.*?>", "\n", entry).split("\n") if text.strip()]
        assert probability in labels[2]
        (link,) = re.findall('href="([^"]+)"', entry)
        assert os.fsdecode(unquote_to_bytes(urlsplit(link).path)) == data.items[2 * k + 1].path


def test_a_video_that_cannot_be_read_any_more(evaluation, data, tmp_path):
    class Gone:
        def read(self, item, sample, **options):
            if item == data.items[1]:
                raise FileNotFoundError(2, "No such file or directory", item.path)
            return data.read(item, sample, **options)

    write_report(tmp_path / "report.html", evaluation, Gone())
    page = Page(tmp_path / "report.html")
    assert len(page.all("li")) == 4
    assert len(page.all("img")) == 3 * STRIP_FRAMES
    assert "No such file" in page.all("div", "strip")[0][0]


def test_parts_are_optional(tmp_path, evaluation, data):
    def headings(*args, **kwargs):
        write_report(tmp_path / "report.html", *args, **kwargs)
        return [text for text, _ in Page(tmp_path / "report.html").all("h2")]

    assert headings(evaluation, data) == ["Confusion matrix", "Classes", "Mistakes", "Unreadable videos"]
    assert headings(metrics=[{"step": 1, "loss": 2.0}], plan=[PlanLine("lr", 0.1, "given")]) == ["Curves", "Plan"]
    perfect = evaluation_of(data.targets.numpy(), data)
    assert headings(perfect, data)[2] == "Mistakes"
    assert not Page(tmp_path / "report.html").all("li")


def test_multi_label(tmp_path, data):
    targets = [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    probs = [[0.9, 0.4, 0.2], [0.7, 0.9, 0.1], [0.1, 0.95, 0.3]]
    result = evaluation_of(probs, multi_label=True, classes="abc", targets=targets, items=data.items[:3])
    write_report(tmp_path / "report.html", result, data)
    page = Page(tmp_path / "report.html")
    assert [text for text, _ in page.all("h2")] == ["Classes", "Mistakes", "Unreadable videos"]
    rows = {row[0]: row[1:] for row in page.rows("Classes")[1:]}
    assert rows == {  # videos, average precision, bar, missed, wrong
        "b": ["2", "58.3%", "", "1", "1"],
        "a": ["1", "100.0%", "", "0", "1"],
        "c": ["0", "–", "", "0", "0"],
    }
    assert [(m.predicted, m.probability, [name for name, _ in m.true]) for m in find_mistakes(result)] == [
        ("b", pytest.approx(0.95), []),
        ("a", pytest.approx(0.7), ["b"]),
    ]
    assert page.all("b")[0][0] == f"{100 * np.mean([7 / 12, 1]):.1f}%"


def test_many_classes_are_shortened(tmp_path):
    count = 100
    classes = [f"class {i:03d}" for i in range(count)]
    probs, targets = np.eye(count)[[*range(count), 7, 7, 50]], np.eye(count)[[*range(count), 90, 90, 60]]
    items = [Item(f"{i}.mp4", 0) for i in range(count + 3)]
    write_report(tmp_path / "report.html", evaluation_of(probs, classes=classes, targets=targets, items=items))
    page = Page(tmp_path / "report.html")
    matrix = page.rows("Confusion matrix")
    assert len(matrix) == MAX_MATRIX + 1
    assert {"class 007", "class 090", "class 050", "class 060"} <= set(matrix[0])
    (row,) = (row for row in matrix if row[0] == "class 090")
    assert row[matrix[0].index("class 007")] == "2"
    rows = page.rows("Classes")
    assert rows[1][:3] == ["class 090", "3", "33.3%"]  # the weakest
    assert {row[0] for row in rows} == {*classes, "class"}
    assert page.all("details")


def test_file_stays_small(tmp_path):
    """The pictures are noise, the worst case for JPEG."""
    rng = np.random.default_rng(0)

    def read(item, sample, short_side):
        return torch.from_numpy(rng.integers(256, size=(6, 3, 184, 184), dtype=np.uint8)), torch.arange(6)[None]

    result = evaluation_of([[0, 1]] * 50, classes="ab", targets=[[1, 0]] * 50, items=[Item(f"{i}.mp4", 0) for i in range(50)])
    write_report(tmp_path / "report.html", result, SimpleNamespace(read=read))
    assert (tmp_path / "report.html").stat().st_size < 3_000_000
    page = Page(tmp_path / "report.html")
    assert 10 < len(page.all("li")) <= MAX_MISTAKES
    assert len(page.all("img")) == STRIP_FRAMES * len(page.all("li"))


def test_a_labeled_segment_is_linked_at_its_time(tmp_path, data):
    items = [Item(str(tmp_path / "long.mp4"), 0, start=90.5, end=92)]
    result = evaluation_of([[0, 1]], classes="ab", targets=[[1, 0]], items=items)
    write_report(
        tmp_path / "report.html", result, SimpleNamespace(read=lambda item, sample, short_side: data.read(data.items[0], sample))
    )
    ((text, link),) = Page(tmp_path / "report.html").all("a")
    assert link["href"] == Path(tmp_path, "long.mp4").as_uri() + "#t=90.5,92"
    assert text.endswith("long.mp4, 90.5 to 92 s")


def test_curves(page):
    charts = re.findall(r"<figure.*?</figure>", page.source, re.DOTALL)
    assert len(charts) == 2
    lines = [re.findall(r'polyline class="line line-(\d)" points="([^"]+)"', chart) for chart in charts]
    assert [[(name, points.count(",")) for name, points in chart] for chart in lines] == [
        [("0", 9), ("1", 1)],
        [("0", 9), ("1", 2)],
    ]
    ys = [float(point.split(",")[1]) for point in lines[1][1][1].split()]
    assert 0 < ys[1] < ys[0] < HEIGHT  # 60% is above 40%
    assert "validation mAP" not in page.source


def test_charts():
    assert ticks(2.2, 5) == [0, 0.5, 1, 1.5, 2, 2.5]
    assert ticks(100, 5) == [0, 20, 40, 60, 80, 100]
    assert ticks(0, 5)[-1] >= 1
    assert thinned([(0, 1), (1, 3)]) == [(0, 1), (1, 3)]
    many = thinned([(i, i % 2) for i in range(10_000)])
    assert len(many) <= MAX_POINTS
    assert {y for _, y in many} == {0.5}
    assert "&lt;" in line_chart("a < b", [Line("x", [(0, 0)])], x_name="step")
