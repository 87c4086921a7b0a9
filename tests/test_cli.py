import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import small
import torch
from scripts import ROOT, call
from terminal import run_in_terminal, screen
from videos import write_video

import tpn
from tpn import cli
from tpn.cli import models, results
from tpn.models.classifier import TPNClassifier
from tpn.zoo import saved
from tpn.zoo.checkpoints import get_checkpoint

NAME = "tsm_r50_sthv2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Valid and invalid videos, and a saved model."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    tpn.save_pretrained(tpn.create_model(NAME, base_channels=8), folder / "model")
    write_video(folder / "a video.mp4", num_frames=12)
    write_video(folder / "b.mp4", num_frames=3)
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no video\n" * 50)
    return folder


def run(*args, cwd, **env):
    """Run `tpn` in this process. Return its exit code, standard output, and standard error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        for name, value in env.items():
            patch.setenv(name, value)
        return call(cli.main, "tpn", *args)


def test_predict_prints_names(folder):
    done = run("predict", "a video.mp4", "--model", "local-dir:model", "--views", "2x1", "--top", 2, cwd=folder)
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first == "a video.mp4  (2 views)"
    labels = get_checkpoint(NAME).config.labels
    assert len(rest) == 2
    assert all(line.split("%  ")[1] in labels for line in rest)


def test_precision(folder):
    exact, half = (
        json.loads(run("predict", "a video.mp4", *ONE_VIEW, "--json", *options, cwd=folder).stdout)
        for options in ([], ["--precision", "bfloat16"])
    )
    assert exact["top"][0] != half["top"][0]
    assert exact["top"][0]["label"] == half["top"][0]["label"]


def test_unreadable_files_are_reported_and_skipped(folder):
    videos = ["a video.mp4", "empty.mp4", "missing.mp4", "text.mp4", "b.mp4"]
    done = run("predict", *videos, "-m", "local-dir:model", "--views", "1x1", "--json", cwd=folder)
    assert done.returncode == 1
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["file"] for row in rows] == videos
    assert ["error" in row for row in rows] == [False, True, True, True, False]
    assert sum(p["probability"] for p in rows[0]["top"]) <= 1 + 1e-6
    assert len(rows[0]["top"]) == 5
    errors = done.stderr.splitlines()
    assert [line.split(": ")[:2] for line in errors] == [["error", name] for name in videos[1:4]]


ONE_VIEW = ("-m", "local-dir:model", "--views", "1x1")


@pytest.fixture
def tree(folder, tmp_path):
    """A folder with videos at several depths and other files, a folder without videos, and the saved model."""
    for name in ("videos/b.mp4", "videos/deep/er/[red]c[/].MKV", "videos/a.mp4", "videos/.hidden/d.mp4", "videos/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(folder / "b.mp4")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "model").symlink_to(folder / "model")
    return tmp_path


def test_folders_stand_for_the_videos_below_them(tree):
    done = run("predict", "videos/notes.txt", "videos", *ONE_VIEW, "--top", 1, cwd=tree)
    assert done.returncode == 0, done.stderr
    names = ["videos/notes.txt", "videos/a.mp4", "videos/b.mp4", "videos/deep/er/[red]c[/].MKV"]
    assert done.stdout.splitlines()[::2] == [f"{name}  (1 view)" for name in names]


def test_folders_without_videos_are_errors(tree):
    done = run("predict", "nothing", "--model", "nonsense", cwd=tree)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: nothing: no videos in this folder\n")
    done = run("predict", "nothing", "videos/a.mp4", *ONE_VIEW, "--json", cwd=tree)
    assert (done.returncode, done.stderr) == (1, "error: nothing: no videos in this folder\n")
    assert [json.loads(line)["file"] for line in done.stdout.splitlines()] == ["nothing", "videos/a.mp4"]


def test_csv(tree):
    (tree / "a, b.mp4").touch()
    done = run("predict", "videos/a.mp4", "a, b.mp4", *ONE_VIEW, "--top", 2, "--csv", cwd=tree)
    assert (done.returncode, done.stderr) == (1, "error: a, b.mp4: the file is empty\n")
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert list(rows[0]) == ["path", "rank", "label", "probability", "error"]
    top = json.loads(run("predict", "videos/a.mp4", *ONE_VIEW, "--top", 2, "--json", cwd=tree).stdout)["top"]
    assert [(row["path"], row["rank"], row["label"], float(row["probability"])) for row in rows[:2]] == [
        ("videos/a.mp4", str(i), each["label"], each["probability"]) for i, each in enumerate(top, start=1)
    ]
    assert list(rows[2].values()) == ["a, b.mp4", "", "", "", "a, b.mp4: the file is empty"]
    assert len(rows) == 3
    none = run("predict", "videos/a.mp4", *ONE_VIEW, "--min-probability", 1, "--csv", cwd=tree).stdout
    assert none.splitlines()[1:] == ["videos/a.mp4,,,,"]
    assert run("predict", "videos", "--csv", "--json", cwd=tree).returncode == 2


@pytest.mark.parametrize("command", ["predict", "demo", "timeline", "explain", "check", "features"])
@pytest.mark.parametrize("address", ["https://host.example/a%20b.mp4", "s3://bucket/a.mp4", "rtsp://camera:554/1"])
def test_urls_are_refused(tmp_path, command, address):
    options = ["--output", "a.npz"] if command == "features" else []
    done = run(command, address, *options, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"error: {address} .*download it.*\n", done.stderr)


def test_weights_that_need_a_manual_download_are_refused_at_once(folder, monkeypatch):
    monkeypatch.setattr(TPNClassifier, "from_config", lambda *_, **__: pytest.fail("the model was built"))
    for command in (
        ["predict"],
        ["timeline"],
        ["demo"],
        ["explain"],
        ["features", "--output", "a.npz"],
        ["evaluate"],
        ["export"],
    ):
        name = "tpn_slowonly_r50_k400.original"
        args = [name, "--format", "pt2"] if command == ["export"] else ["b.mp4", "--model", name]
        done = run(*command, *([name, "."] if command == ["evaluate"] else args), cwd=folder, TPN_CACHE=str(folder / "cache3"))
        assert done.returncode == 1
        assert re.fullmatch(rf"(.*rendered.*\n)?error: .*{name} .*https://drive.*tpn convert FILE --model {name}\n", done.stderr)


def test_json_is_ascii(capsys):
    """Whatever the encoding of the output: one that lacks a character would write an escape that JSON does not have."""
    prediction = SimpleNamespace(top=lambda *_, **__: [("Tür", 1.0)], view_logits=[0])
    results.PredictionPrinter("json", 1).prediction(Path("é😀.mp4"), prediction)
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert json.loads(printed)["file"] == "é😀.mp4"


def test_missing_files_are_reported_before_the_model_is_downloaded(folder):
    done = run("predict", "no.mp4", "none.mp4", "--model", "nonsense", "--json", cwd=folder)
    assert done.returncode == 1
    assert [json.loads(line)["error"] for line in done.stdout.splitlines()] == [
        "no.mp4: No such file or directory",
        "none.mp4: No such file or directory",
    ]
    assert done.stderr == "error: no.mp4: No such file or directory\nerror: none.mp4: No such file or directory\n"
    for command in (["explain"], ["timeline"], ["demo"], ["features", "--output", "a.npz"]):
        done = run(*command, "no.mp4", "--model", "nonsense", cwd=folder)
        assert (done.returncode, done.stderr) == (1, "error: no.mp4: No such file or directory\n")


def test_bad_output_is_reported_before_the_model_is_downloaded(folder):
    pytest.importorskip("onnx", reason='pip install "tpn[export]"')
    (folder / "folder.onnx").mkdir()
    for path, bad in (("nowhere/a.onnx", "nowhere"), ("folder.onnx", "folder.onnx")):
        done = run("export", "nonsense", "--output", path, cwd=folder)
        assert done.returncode == 1
        assert re.fullmatch(rf"error: {bad}: .+\n", done.stderr)
    assert "'a.txt'" in run("export", "nonsense", "--output", "a.txt", cwd=folder).stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["predict", "b.mp4", "--model", "nonsense"], 1, "unknown model 'nonsense'"),
        (["predict", "b.mp4", "--model", "local-dir:nowhere"], 1, "nowhere"),
        (["predict", "b.mp4", "-m", NAME, "--checkpoint", "empty.mp4"], 1, "empty.mp4: the file is empty"),
        (["predict", "b.mp4", "-m", "local-dir:model", "--device", "warp"], 1, "got 'warp'"),
        (["predict", "b.mp4", "--precision", "int4"], 2, "'bfloat16'"),
        (["features", "b.mp4", "-o", "new", "--stride", "8", "--window", "7"], 1, "window must be a multiple"),  # no download
        (["predict"], 2, "Missing argument"),
        (["list", "zzz*"], 1, "no model matches 'zzz*'"),
        (["convert", "text.mp4", "-m", NAME], 1, "neither a safetensors nor a PyTorch file"),
        (["frobnicate"], 2, "No such command"),
    ],
)
def test_errors_are_one_line(folder, args, code, message):
    done = run(*args, cwd=folder, TPN_CACHE=str(folder / "cache"))
    assert done.returncode == code
    assert message in " ".join(done.stderr.split())
    assert not done.stdout
    if code == 1:
        assert len(done.stderr.splitlines()) == 1


def test_list_and_info(folder):
    table = run("list", cwd=folder).stdout.splitlines()
    assert [line.split()[0] for line in table[1 : 1 + len(tpn.list_models())]] == tpn.list_models()
    assert "reported upstream" in table[-1]
    checkpoints = run("list", "*r50*", "--weights", "--json", cwd=folder).stdout.splitlines()
    assert [json.loads(line)["model"] for line in checkpoints] == tpn.list_models("*r50*", pretrained=True)
    saved = run("info", "local-dir:model", cwd=folder).stdout
    assert re.search(
        rf"^architecture +{NAME}\nbackbone +tsm depth=50 shift_shortcut=True base_channels=8\nparams +\d+\n", saved, re.M
    )
    assert len(json.loads(run("info", "local-dir:model", "--json", cwd=folder).stdout)["labels"]) == 174
    info = run("info", "tpn_slowonly_r50_k400", cwd=folder).stdout
    entry = get_checkpoint("tpn_slowonly_r50_k400")
    accuracy = (f"{entry.reported_top1:.2f}", f"{entry.reported_top5:.2f}")
    for fact in (*accuracy, "91.5 M", "50.3", "8x8", "Kinetics-400", "10 clips x 3 crops of 256", "MMAction2", "scratch"):
        assert fact in info


@pytest.fixture
def narrow(monkeypatch):
    small.change_entry(small.BY_HAND, monkeypatch.setattr)


def test_convert_into_the_cache_makes_pretrained_work(folder, narrow):
    (folder / "original.pth").write_bytes(small.upstream_file(small.BY_HAND)[0])
    done = run("convert", "original.pth", "-m", NAME, cwd=folder, TPN_CACHE=str(folder / "cache"))
    assert done.returncode == 0, done.stderr
    assert 'tpn.create_model("tsm_r50_sthv2.original", pretrained=True)' in done.stderr
    loaded = tpn.create_model(NAME, pretrained=True, cache_dir=folder / "cache")
    assert (folder / "cache" / f"{NAME}.original" / saved.CONFIG_FILE).is_file()
    assert small.same(loaded, tpn.create_model(NAME, checkpoint_path=folder / "original.pth").state_dict())


def test_convert_of_a_fine_tuned_checkpoint_needs_a_folder(folder, narrow):
    state = tpn.create_model(NAME, num_classes=3).state_dict()
    torch.save({name.replace("head.fc", "cls_head.fc_cls"): tensor for name, tensor in state.items()}, folder / "three.pth")
    done = run("convert", "three.pth", "-m", NAME, cwd=folder, TPN_CACHE=str(folder / "cache2"))
    assert done.returncode == 1
    assert "--output" in done.stderr
    assert not (folder / "cache2").exists()
    done = run("convert", "three.pth", "-m", NAME, "-o", "three", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert tpn.create_model(f"local-dir:{folder / 'three'}").num_classes == 3


def test_version_help_and_closed_pipe(folder):
    assert run("--version", cwd=folder).stdout == f"tpn {tpn.__version__}\n"
    assert "predict" in run("--help", cwd=folder).stdout
    shell = f"{sys.executable} -m tpn list --weights --json | head -n 1; exit ${{PIPESTATUS[0]}}"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", shell], cwd=folder, env=env, capture_output=True, text=True, timeout=100)
    assert not done.stderr
    assert done.stdout.count("\n") == 1


TINY = ("--model", "tpn_slowonly_tiny_motion", "--views", "1x1")


@pytest.mark.slow
def test_results_are_printed_above_the_progress_bars(folder):
    """As whole lines, although the terminal is narrower than the results."""
    code, _, text = run_in_terminal("predict", "a video.mp4", "missing.mp4", "b.mp4", *TINY, "--top", 2, cwd=folder, columns=20)
    assert code == 1
    assert "views \x1b[" in text
    shape = [re.sub(r" +\d+\.\d\d%  [a-z -]+", "  %  label", line) for line in screen(text, 20) if line]
    assert shape == [
        "a video.mp4  (1 view)",
        *["  %  label"] * 2,
        "error: missing.mp4: No such file or directory",
        "b.mp4  (1 view)",
        *["  %  label"] * 2,
    ]


@pytest.mark.slow
def test_redirected_results_are_plain_text(folder):
    """The terminal still shows the bars."""
    _, stdout, text = run_in_terminal("predict", "b.mp4", "b.mp4", *TINY, "--json", cwd=folder, stdout=subprocess.PIPE)
    assert [json.loads(line)["file"] for line in stdout.splitlines()] == ["b.mp4", "b.mp4"]
    assert "views \x1b[" in text
    assert not any(screen(text))


@pytest.mark.parametrize("columns", [80, 140])
def test_list_never_truncates(folder, columns):
    rows = [json.loads(line) for line in run("list", "--weights", "--json", cwd=folder).stdout.splitlines()]
    table = run("list", "--weights", cwd=folder, COLUMNS=str(columns)).stdout
    assert "…" not in table
    for row, line in zip(rows, table.splitlines()[1:], strict=False):
        assert not {"shown", "details"} & row.keys()
        _, *cells = models._columns(row["model"], weights=True).values()
        assert re.split(r" {2,}", line.strip()) == [row["model"], *filter(None, cells)]


def test_unexpected_errors_are_one_line(folder, monkeypatch):
    monkeypatch.setattr(models, "_facts", lambda name: 1 / 0)
    assert re.fullmatch(r"error: ZeroDivisionError: division by zero .*TPN_DEBUG=1.*\n", run("info", "x", cwd=folder).stderr)
    with pytest.raises(ZeroDivisionError):
        run("info", "x", cwd=folder, TPN_DEBUG="1")


def test_check(folder, tmp_path):
    for name in ("good", "bad class"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "a.mp4").symlink_to(folder / "b.mp4")
    done = run("check", "data", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "2 videos in 2 classes, 0 unreadable\n")
    (tmp_path / "data" / "bad class" / "x y.mp4").write_bytes(b"")
    done = run("check", "data", "--report", "none/r.txt", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "error: none: no such folder\n")
    done = run("check", "data", "--report", "r.txt", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "3 videos in 2 classes, 1 unreadable\n")
    bad = os.path.join("data", "bad class", "x y.mp4")
    assert done.stderr == f"{bad}: the file is empty\nerror: r.txt lists the unreadable files\n"
    path, reason = (tmp_path / "r.txt").read_text().rstrip().split("\t")
    assert (path, reason) == (bad, "the file is empty")
    (tmp_path / path).rename(tmp_path / "data" / "good" / os.fsdecode(b"caf\xe9.mp4"))  # a name that is not UTF-8
    assert run("check", "data", "--report", "r.txt", cwd=tmp_path).returncode == 1
    assert (tmp_path / "r.txt").read_text() == "data/good/caf\\udce9.mp4\tthe file is empty\n"
    (tmp_path / "data" / "good" / os.fsdecode(b"caf\xe9.mp4")).unlink()
    assert run("check", "data", "--report", "r.txt", cwd=tmp_path).returncode == 0
    assert not (tmp_path / "r.txt").exists()
    assert run("check", "nowhere", cwd=tmp_path).stderr == "error: nowhere: No such file or directory\n"
    (tmp_path / "list.txt").write_text("data/good/a.mp4 0\nfolder/of/frames.mp4 1\n")
    assert run("check", "list.txt", cwd=tmp_path).stdout == "2 videos in 2 classes, 1 unreadable\n"
