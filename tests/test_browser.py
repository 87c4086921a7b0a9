"""The page "Try it" of a built site, in a browser: what it loads, and what it names. See docs/browser/build.py."""

import json
import math
import os
import shutil
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import pytest
import torch
from pages import ROOT
from servers import QuietServer
from test_docs import load

import tpn
from tpn.video import motion
from tpn.video.sources import channels_first
from tpn.video.transforms import normalize, resize_short_side

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SITE = Path(os.environ.get("TPN_SITE", "."))
MAX_BYTES = 25_000_000
SECONDS = 60  # until a motion must have its name: about one, but more on a machine with other work, where a drag comes in jerks


def test_site_without_the_runtime(tmp_path, monkeypatch):
    hooks = load(ROOT / "docs" / "hooks.py")
    monkeypatch.setattr(hooks, "TRY_FILES", tmp_path / "try")
    assert "docs/browser/build.py" in hooks.on_page_markdown("<!-- runtime -->")
    hooks.TRY_FILES.mkdir()
    (hooks.TRY_FILES / "model.onnx").write_bytes(bytes(3_000_000))
    assert 'data-bytes="3000000">Load the model, 3 MB<' in hooks.on_page_markdown("<!-- runtime -->")


def test_lock_file_names_no_other_registry():
    lock = json.loads((ROOT / "docs" / "browser" / "package-lock.json").read_text(encoding="utf-8"))
    resolved = [package.get("resolved", "https://registry.npmjs.org/") for package in lock["packages"].values()]
    assert all(url.startswith("https://registry.npmjs.org/") for url in resolved)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if CHROMIUM is None:
        pytest.skip("Chromium is missing")
    with playwright.sync_playwright() as each:
        yield each.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-background-networking"])


@pytest.fixture(scope="module")
def origin():
    if not (SITE / "assets" / "try" / "model.onnx").is_file():
        pytest.skip("set TPN_SITE to a site that was built after docs/browser/build.py, which needs npm")

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = QuietServer(("127.0.0.1", 0), partial(Handler, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def visit(browser, origin):
    """Open the page, with the shape in the middle, at 180 degrees. Fail if the page has errors or asks another host."""
    contexts, errors = [], []

    def open_page(width=1440, *, loaded=True, motion="reduce", **settings):
        context = browser.new_context(viewport={"width": width, "height": 844}, reduced_motion=motion, **settings)
        contexts.append(context)
        page = context.new_page()
        page.requests = []
        context.on("request", lambda request: page.requests.append(request))
        page.on("pageerror", lambda error: errors.append(error))
        page.add_init_script("Math.random = () => 0.5")
        page.goto(f"{origin}/try.html")
        if loaded:
            page.click("#try-load")
            page.wait_for_function("window.tpn")
        return page

    yield open_page
    for context in contexts:
        requested = [request.url for request in context.pages[0].requests]
        assert [url for url in requested if not url.startswith((origin, "data:", "blob:"))] == []
        context.close()
    assert errors == []


def name(page):
    return page.inner_text("#try-live")


def perform(page, label, step=lambda seconds: None):
    """Call `step` with the time until the page says the label."""
    start = time.monotonic()
    while name(page) != label:
        seconds = time.monotonic() - start
        assert seconds < SECONDS, f"{label} is {name(page)}"
        step(seconds)
        page.wait_for_timeout(10)


def picture(page):
    """Return the middle of the picture and its side, in pixels of the page."""
    page.locator("#try-stage").scroll_into_view_if_needed()
    box = page.locator("#try-stage").bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, box["width"]


@pytest.mark.slow
def test_what_is_loaded(visit, origin):
    page = visit(loaded=False)
    page.wait_for_load_state("networkidle")
    before = len(page.requests)
    assert not any("try.worker" in request.url or "assets/try/" in request.url for request in page.requests)
    assert page.locator(".try button").first.is_disabled()
    page.click("#try-load")
    page.wait_for_function("window.tpn")
    after = [request.url.removeprefix(f"{origin}/assets/") for request in page.requests[before:]]
    files = [f"try/{path.name}" for path in (SITE / "assets" / "try").iterdir()]
    assert sorted(after) == sorted([*files, "try.worker.js"])
    assert 15_000_000 < sum(request.sizes()["responseBodySize"] for request in page.requests) < MAX_BYTES


@pytest.mark.slow
def test_logits_are_those_of_the_model(visit):
    model = tpn.create_model("tpn_slowonly_tiny_motion", pretrained=True).eval()
    spec = model.input_spec
    frames = channels_first(motion.render(motion.CLASSES.index("growing"), tempo=3, seed=5)[spec.indices(64)[0]])
    clip = normalize(resize_short_side(frames, spec.crop_size), spec.mean, spec.std)
    with torch.inference_mode():
        expected = model(clip[None])[0]
    script = "async (values) => Object.values((await tpn.classify(Float32Array.from(JSON.parse(values)))).logits)"
    got = visit().evaluate(script, json.dumps(clip.flatten().tolist()))
    torch.testing.assert_close(torch.tensor(got), expected, atol=1e-4, rtol=0)
    assert expected.argmax() == motion.CLASSES.index("growing")


@pytest.mark.slow
def test_mouse(visit):
    page = visit()
    x, y, side = picture(page)
    perform(page, "at rest")
    page.mouse.move(x, y + side / 4)
    page.mouse.down()
    perform(page, "moving right", lambda t: page.mouse.move(x + 0.6 * side * t, y + side / 4))
    page.mouse.up()
    perform(page, "at rest")
    assert page.inner_text("#try-detail").strip() == ""

    page.click("#try-new")
    x, y, side = picture(page)
    arm = 1.6 * math.sqrt(9 * 22) / 112 * side  # from the middle of the shape to its handle
    page.mouse.move(x - arm, y)
    page.mouse.down()
    perform(page, "turning clockwise", lambda t: page.mouse.move(x - arm * math.cos(4 * t), y - arm * math.sin(4 * t)))
    page.mouse.up()


@pytest.mark.slow
def test_keys(visit):
    page = visit()
    page.set_viewport_size({"width": 1440, "height": 400})  # arrows could scroll
    page.locator("#try-stage").focus()
    scrolled = page.evaluate("scrollY")
    for key, label in {
        "ArrowDown": "moving down",
        "e": "turning clockwise",
        "[": "turning counter-clockwise",
        "+": "growing",
    }.items():
        page.keyboard.down(key)
        perform(page, label)
        page.keyboard.up(key)
    assert page.evaluate("scrollY") == scrolled
    assert page.get_attribute("#try-live", "aria-live") in (None, "polite")  # an output is a live region


@pytest.mark.slow
def test_touch_on_a_narrow_screen(visit):
    page = visit(390, has_touch=True, is_mobile=True, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    x, y, side = picture(page)
    send = page.context.new_cdp_session(page).send

    def touch(kind, *points):
        send(
            "Input.dispatchTouchEvent",
            {"type": kind, "touchPoints": [{"x": a, "y": b, "id": i} for i, (a, b) in enumerate(points)]},
        )

    def around(turns, radius):
        a, b = radius * math.cos(2 * math.pi * turns), radius * math.sin(2 * math.pi * turns)
        return (x + a, y + b), (x - a, y - b)

    touch("touchStart", (x, y + side / 4))
    perform(page, "moving left", lambda t: touch("touchMove", (x - 0.6 * side * t, y + side / 4)))
    touch("touchEnd")
    touch("touchStart", *around(0, side / 4))
    perform(page, "turning counter-clockwise", lambda t: touch("touchMove", *around(-0.7 * t, side / 4)))
    touch("touchMove", *around(0, side / 12))  # the smallest size
    perform(page, "at rest")
    perform(page, "growing", lambda t: touch("touchMove", *around(0, side / 12 * math.exp(min(0.7 * t, 0.9)))))
    touch("touchEnd")

    page.locator("[data-hold='shrinking']").scroll_into_view_if_needed()
    box = page.locator("[data-hold='shrinking']").bounding_box()
    touch("touchStart", (box["x"] + 10, box["y"] + 10))
    perform(page, "shrinking")
    touch("touchEnd")
    perform(page, "at rest")


@pytest.mark.slow
def test_played_motions(visit):
    page = visit(motion="no-preference")
    perform(page, "moving right")  # the first scene of tpn demo
    page.locator("#try-tempo").fill("1")
    page.get_by_role("button", name="circling clockwise").click()
    perform(page, "circling clockwise")
    assert "2.00x, 1.50 cycles/s" in page.inner_text("#try-tempo-value")
    page.wait_for_function("document.getElementById('try-detail').textContent.endsWith('tempo 1.50 cycles/s')")
    assert page.locator("[aria-pressed='true']").all_inner_texts() == ["circling clockwise"]
    page.get_by_role("button", name="circling clockwise").click()
    perform(page, "at rest")


@pytest.mark.slow
def test_page_says_why_a_clip_has_no_name_and_goes_on(visit):
    page = visit()
    perform(page, "at rest")
    page.evaluate("""() => {
        const post = Worker.prototype.postMessage;
        const damage = (message) => ({ ...message, clip: new Float32Array(1) });
        Worker.prototype.postMessage = function (message) { post.call(this, damage(message)); };
        window.repair = () => { Worker.prototype.postMessage = post; };
    }""")
    page.wait_for_function("document.getElementById('try-live').textContent.startsWith('Error')")
    page.evaluate("repair()")
    perform(page, "at rest")


@pytest.mark.slow
def test_page_says_why_nothing_runs(visit, browser):
    page = visit(loaded=False)
    page.route("**/model.onnx", lambda route: route.fulfill(status=404))
    page.click("#try-load")
    page.wait_for_selector("text=model.onnx: HTTP 404")
    page.unroute("**/model.onnx")
    page.route("**/model.onnx", lambda route: route.fulfill(body="damaged"))
    page.click("#try-load")
    page.wait_for_selector("text=The model did not load (Error")
    page.unroute("**/model.onnx")
    page.click("#try-load")
    page.wait_for_function("window.tpn")
    assert sum(worker.url.endswith("try.worker.js") for worker in page.workers) == 1

    page = browser.new_page()
    page.goto((SITE / "try.html").resolve().as_uri())
    assert page.locator("#try-load").is_disabled()
    assert "python -m http.server" in page.inner_text("#try-load")
    page.close()
