"""Write what the page "Try it" loads: the bundled model as ONNX, its metadata as JSON, and the WebAssembly runtime.

python docs/browser/build.py     # needs npm, and pip install ".[export]"
"""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import tpn
from tpn import export

HERE = Path(__file__).parent
ASSETS = HERE.parent / "pages" / "assets" / "try"
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
"""One thread needs no headers that isolate the page, which hosts of static sites do not send."""


def build(folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit("npm is missing; install Node.js from https://nodejs.org")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, work)
        subprocess.run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=work, check=True)
        for name in RUNTIME:
            shutil.copy(Path(work, "node_modules", "onnxruntime-web", "dist", name), folder)
    model = tpn.create_model("tpn_slowonly_tiny_motion", pretrained=True)
    file = export.export_onnx(model, folder / "model.onnx")
    (folder / "model.json").write_text(json.dumps(export.load(file).about), encoding="utf-8")


if __name__ == "__main__":
    build(ASSETS)
