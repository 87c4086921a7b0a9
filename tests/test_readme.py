"""Everything the README shows runs, in one process as one reader would type it, without the internet."""

import hashlib
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import tpn
from tpn.zoo import saved, sources
from tpn.zoo.weights import get_weights

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def snippets(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of a Hugging Face Hub that a download of one file asks for."""

    folder: Path

    def do_HEAD(self):
        match = re.fullmatch(r"/me/my-tpn/resolve/main/([\w.]+)", self.path)
        file = self.folder / match[1] if match else None
        if file is None or not file.is_file():
            self.send_error(404)
            return None
        data = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        return data

    def do_GET(self):
        data = self.do_HEAD()
        if data is not None:
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A folder with a video and a checkpoint, and the environment of a machine whose cache holds the weights."""
    from videos import write_video  # the decoder is only needed here

    root = tmp_path_factory.mktemp("machine")
    weights = get_weights("tpn_slowonly_r50_k400")
    tpn.save_pretrained(tpn.create_model(weights.name), sources.cache_folder(weights, root / "cache"))
    (root / "work").mkdir()
    write_video(root / "work" / "video.mp4", num_frames=20)
    os.link(root / "cache" / weights.name / saved.WEIGHTS_FILE, root / "work" / "mine.pth")
    repo = root / "torch" / "hub" / "org_tpn_main"
    repo.mkdir(parents=True)
    shutil.copy(ROOT / "hubconf.py", repo)
    shutil.copytree(ROOT / "tpn", repo / "tpn", ignore=shutil.ignore_patterns("__pycache__"))
    env = os.environ | {
        "TPN_CACHE": str(root / "cache"),
        "TORCH_HOME": str(root / "torch"),
        "HF_HOME": str(root / "hf"),
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    env.pop("HF_HUB_OFFLINE", None)
    yield root / "work", env
    shutil.rmtree(root)


@pytest.mark.slow
def test_python_snippets(machine):
    folder, env = machine
    handler = type("Handler", (Hub,), {"folder": folder / "my-tpn"})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        script = "\n".join(snippets("python")) + "\nprint('end', features.shape, model.num_classes, model.labels[11])\n"
        env = env | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=env, capture_output=True, text=True, timeout=400)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "end torch.Size([2, 2048, 1, 7, 7]) 12 my class 11"
    assert re.match(r"\d+\.\d%  \w", done.stdout)


@pytest.mark.slow
def test_shell_snippets(machine):
    folder, env = machine
    lines = [line.partition("#")[0].strip() for block in snippets("bash") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("tpn ")]
    commands += [line.partition("&& ")[2] + " --views 1x1" for line in lines if line.endswith("&& tpn predict video.mp4")]
    assert len(commands) == 5
    for command in commands:
        command = re.sub(r"^tpn ", f"{sys.executable} -m tpn ", command)
        done = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout or "wrote my-tpn" in done.stderr


def test_table_agrees_with_the_weights():
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \| ([\d.]+) \|$", README, re.MULTILINE)
    assert len(rows) == 4
    for model, frames, data, top1 in rows:
        weights = get_weights(model)
        spec = weights.input
        wanted = f"{spec.num_frames} x {spec.frame_interval}" if spec.sampling == "dense" else f"{spec.num_frames} segments"
        assert (frames, data, float(top1)) == (wanted, weights.dataset.title, weights.reported_top1)


def test_picture_is_what_its_script_draws(tmp_path):
    script = ROOT / "docs" / "figures" / "pyramid.py"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, script, tmp_path / "pyramid.svg"], env=env, check=True)
    assert (tmp_path / "pyramid.svg").read_bytes() == script.with_suffix(".svg").read_bytes()
