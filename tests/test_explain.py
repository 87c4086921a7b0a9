"""Occlusion and Grad-CAM maps, shares of the parts of the pyramid, pictures, and `tpn explain`."""

import sys
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backbones import SMALL as SPEC
from backbones import Pyramid
from matplotlib.figure import Figure
from PIL import Image
from test_cli import run
from test_models import randomize_norms
from torch import nn

import tpn
from tpn import explain as explaining
from tpn.explain import explain, grad_cam, occlusion, overlay
from tpn.models.layers import freeze_batch_norm
from tpn.video import motion
from tpn.video.decode import read_frames
from tpn.video.encode import write_video

NAME = "tpn_slowonly_tiny_motion"


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("explain") / "video.mp4"
    write_video(path, motion.render(1, tempo=4, seed=1, num_frames=60), fps=motion.FPS)  # a still one has no maps
    return path


def build(name, **kwargs):
    """A narrow network with logits as large as those of a trained one."""
    torch.manual_seed(0)
    model = randomize_norms(tpn.create_model(name, **kwargs))
    nn.init.normal_(model.head.fc.weight)
    return model


def clips_of(model, size=64):
    return torch.randn(2, 3, model.input_spec.num_frames, size, size)


@pytest.fixture(scope="module")
def moving(classifier):
    """Two clips of every class with unseen seeds, masks of the moving shape, and the labels."""
    spec, rng, frames, covered = classifier.spec, np.random.default_rng(1), [], []
    labels = [label for label in range(len(motion.CLASSES)) for _ in range(2)]
    for i, label in enumerate(labels):
        shown = {"tempo": float(np.exp(rng.uniform(0, np.log(8)))), "seed": (9001, i % 2), "num_frames": 31}
        frames.append(torch.from_numpy(motion.render(label, **shown)[::2]).permute(0, 3, 1, 2))
        covered.append(torch.from_numpy(motion.masks(label, **shown)[::2]).float())
    clips = torch.stack([spec.normalize(spec.crops(each)[0]) for each in frames])
    masks = torch.stack([F.interpolate(each[:, None], clips.shape[-2:], mode="area")[:, 0] for each in covered])
    return clips, masks, torch.tensor(labels)


def times_area(maps, masks):
    """Share of a map that lies on the shape, divided by that of a uniform map, as mean over clips. A zero map counts as uniform."""
    maps = torch.where(maps.sum(dim=(1, 2, 3), keepdim=True) > 0, maps, 1.0)
    inside = (maps * masks).sum(dim=(1, 2, 3)) / maps.sum(dim=(1, 2, 3))
    return float(inside.mean() / masks.mean())


def test_a_still_clip_has_empty_maps(classifier, tmp_path):
    """Rounding is not evidence."""
    for seed in range(3):
        frame = np.random.default_rng(seed).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
        assert not any(heat.any() for heat in explain(classifier, frame.repeat(64, axis=0)).maps)
    write_video(tmp_path / "still.mp4", np.full((64, 64, 64, 3), 99, np.uint8), fps=16)  # noise would change when encoded
    done = run("explain", "still.mp4", "-m", NAME, cwd=tmp_path)
    assert (done.returncode, done.stderr.splitlines()[0].split(":")[0]) == (0, "the maps are empty")


@pytest.mark.slow
def test_maps_point_at_the_moving_shape(classifier, moving):
    """Random maps and maps of other clips do not."""
    for method, count, least in ((occlusion, 14, (2.5, 2.5)), (grad_cam, 28, (1.4, 1.15))):  # 14: one of each class
        clips, masks, labels = (each[:: 28 // count] for each in moving)
        for level, maps in enumerate(method(classifier.model, clips, labels)):
            assert maps.shape == masks.shape
            assert times_area(maps, masks) > least[level], (method, level)
            assert 0.6 < times_area(maps.roll(count // 4, 0), masks) < 1.3, (method, level)
    _, masks, _ = moving
    for cells in (2, 4):
        random = F.interpolate(torch.rand(28, 1, cells, cells, cells), masks.shape[1:], mode="trilinear")[:, 0]
        assert 0.9 < times_area(random, masks) < 1.1


@pytest.mark.parametrize("name", ["slowonly_r50_k400", "tpn_slowonly_r50_k400"])
def test_occlusion_by_hand(name):
    model = build(name, base_channels=8).eval()
    clips, targets = clips_of(model), torch.tensor([7, 5])
    whole = model.feature_maps(model.backbone(clips))
    falls = torch.zeros(len(whole), 2, 2, 2, 2)
    for t, y, x in np.ndindex(2, 2, 2):
        box = (slice(None), slice(None), slice(4 * t, 4 * t + 4), slice(32 * y, 32 * y + 32), slice(32 * x, 32 * x + 32))
        covered = clips.clone()
        covered[box] = clips.mean(dim=2, keepdim=True).expand_as(clips)[box]
        for level, changed in enumerate(model.feature_maps(model.backbone(covered))):
            maps = [changed if i == level else each for i, each in enumerate(whole)]
            logits = model.forward_head(maps[0] if model.neck is None else model.neck(maps))
            falls[level, :, t, y, x] = (model(clips) - logits).detach()[range(2), targets]
    found = occlusion(model, clips, targets, cells=2)
    expected = F.interpolate(falls.clamp(min=0), clips.shape[2:], mode="trilinear")
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-3, atol=1e-5)
    assert (falls.amax(dim=(1, 2, 3, 4)) > 0.001).all()


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("slowonly_r50_k400", {}),
        ("tpn_tsm_r50_sthv1", {}),
        ("tpn_slowonly_r50_k400", {"out_indices": (3, 3), "temporal_scales": (2, 8)}),
    ],
)
def test_grad_cam_by_hand(name, kwargs):
    model = build(name, base_channels=8, **kwargs).eval()
    clips = clips_of(model)
    maps = [each.detach().requires_grad_() for each in model.feature_maps(model.backbone(clips))]
    model.forward_head(maps[0] if model.neck is None else model.neck(maps))[:, 7].sum().backward()
    found = grad_cam(model, clips, 7)
    for got, each in zip(found, maps, strict=True):
        weighted = (each.grad.mean(dim=(2, 3, 4), keepdim=True) * each).sum(dim=1, keepdim=True).relu()
        torch.testing.assert_close(got, F.interpolate(weighted, clips.shape[2:], mode="trilinear")[:, 0].detach())
    assert max(got.max() for got in found) > 0


BOTH = ["top_down", "bottom_up"]
GENERIC = {"num_classes": 5, "input_spec": SPEC}
MODELS = {
    "levels of other lengths": (NAME, {"temporal_scales": (4, 16)}, 2, BOTH),
    "one flow": (NAME, {"flow_order": "bottom_up"}, 2, ["bottom_up"]),
    "isolation": (NAME, {"flow_order": "isolation", "temporal_modulation": False}, 2, []),
    "TSM": ("tpn_tsm_r50_sthv1", {"base_channels": 8}, 2, BOTH),
    "without pyramid": ("tsm_r50_sthv2", {"base_channels": 8}, 1, []),
    "timm": ("tpn", {"backbone": "timm/resnet18", **GENERIC}, 2, BOTH),
    "own, a dictionary of maps": ("tpn", {"backbone": Pyramid((8, 18), as_dict=True), **GENERIC}, 2, BOTH),
    "torchvision": (
        "tpn",
        {"backbone": "torchvision/r3d_18", **GENERIC, "input_spec": replace(SPEC, num_frames=4), "out_indices": (0, 1, 2, 3)},
        4,
        BOTH,
    ),
}
"""Name, arguments, number of levels, and flows of each model."""


QUICK = ("levels of other lengths", "isolation", "timm")


@pytest.mark.parametrize("which", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS])
def test_every_model(which, video, tmp_path, monkeypatch):
    monkeypatch.setattr(explaining, "RESOLUTION", 0)  # the logits of an untrained network hardly change
    name, kwargs, num_levels, flows = MODELS[which]
    model = build(name, **kwargs)
    torch.manual_seed(0)  # also for the module that was made before; with unlucky weights, no part of a map is positive
    model.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
    spec = model.input_spec = tpn.InputSpec(model.input_spec.num_frames, 2, short_side=72, crop_size=65, num_crops=3)
    explanation = explain(model, video, method="grad-cam")
    assert (explanation.frames.shape, explanation.frames.dtype) == ((spec.num_frames, 3, 65, 65), torch.uint8)
    assert [each.shape for each in explanation.maps] == [(spec.num_frames, 65, 65)] * num_levels
    assert all(each.isfinite().all() and each.min() >= 0 for each in explanation.maps)
    assert any(each.max() > 0 for each in explanation.maps)
    maps = occlusion(model, spec.normalize(explanation.frames)[None], explanation.target, cells=2)
    assert [each.shape[1:] for each in maps] == [each.shape for each in explanation.maps]
    assert any(each.max() > 0 for each in maps)
    assert len(explanation.levels) == (0 if which == "without pyramid" else num_levels)
    assert list(explanation.flows) == flows
    for parts in filter(None, (explanation.levels, tuple(explanation.flows.values()))):
        assert sum(abs(part.share) for part in parts) == pytest.approx(1)
    explanation.save_png(tmp_path / "map.png")
    explanation.save_mp4(tmp_path / "map.mp4")
    with av.open(str(tmp_path / "map.mp4")) as file:
        pictures = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert len(pictures) == spec.num_frames
    assert pictures[0].shape == (4 * 65, 4 * 65 * (1 + num_levels), 3)


def test_an_interrupted_write_leaves_the_old_picture(classifier, video, tmp_path, monkeypatch):
    def interrupted(figure, path, **kwargs):
        with open(path, "w") as file:
            file.write("half")
        raise OSError("no space")

    explanation = explain(classifier, video, method="grad-cam")
    (tmp_path / "map.png").write_text("old")
    monkeypatch.setattr(Figure, "savefig", interrupted)
    with pytest.raises(OSError, match="no space"):
        explanation.save_png(tmp_path / "map.png")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("map.png", "old")]


def test_explained_clips_are_those_of_the_classifier(classifier, video):
    explanation = explain(classifier, video)
    frames = read_frames(video, range(60))
    as_numpy = explain(tpn.create_model(NAME, pretrained=True), frames.permute(0, 2, 3, 1).numpy())
    for other in (explain(classifier, frames), as_numpy):
        assert torch.equal(other.frames, explanation.frames)
        for got, expected in zip(other.maps, explanation.maps, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-3 * float(expected.max()))
    prediction = classifier(video, num_clips=1, num_crops=1)
    ((label, probability),) = prediction.top(1)
    assert (explanation.label, motion.CLASSES[explanation.target]) == (label, label)
    assert explanation.probability == pytest.approx(probability, abs=1e-5)
    probs = classifier(video).view_logits.softmax(dim=1)
    for clip in range(3):
        explanation = explain(classifier, video, target="growing", clip=clip, method="grad-cam")
        assert explanation.probability == pytest.approx(float(probs[clip, 6]), abs=1e-5)


def test_shares(classifier, video):
    """They are the fall of the logit when the weights of a part are zero."""
    explanation = explain(classifier, video, target="jumping", method="grad-cam")
    clips = classifier.spec.normalize(explanation.frames)[None]

    def logit(change=lambda neck: None):
        model = tpn.create_model(NAME, pretrained=True).eval()
        with torch.no_grad():
            change(model.neck)
            return float(model(clips)[0, 13])

    def without_flow(fusion):
        nn.init.zeros_(fusion.fuse.bn.weight)
        nn.init.zeros_(fusion.fuse.bn.bias)

    levels = [logit() - logit(lambda neck, i=i: nn.init.zeros_(neck.temporal_modulation[i].conv.weight)) for i in (0, 1)]
    flows = [logit() - logit(lambda neck, n=name: without_flow(getattr(neck, f"{n}_fusion"))) for name in explanation.flows]
    for parts, expected in ((explanation.levels, levels), (list(explanation.flows.values()), flows)):
        assert [part.logit for part in parts] == pytest.approx(expected, abs=1e-4)
        assert [part.share for part in parts] == pytest.approx([e / sum(map(abs, expected)) for e in expected], abs=1e-4)
    assert all(abs(difference) > 0.01 for difference in levels + flows)


def state(model):
    modes = {name: module.training for name, module in model.named_modules()}
    hooks = [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    needs = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    return modes, hooks, needs


def test_the_model_does_not_change(video, monkeypatch):
    model = build(NAME).train()
    freeze_batch_norm(model.backbone)
    model.backbone.conv1.requires_grad_(False)
    before, tensors = state(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        first = explain(model, video, method="grad-cam")
    assert state(model) == before
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(explain(model, video, method="grad-cam").maps[0], first.maps[0])  # no dropout either
    occlusion(model, clips_of(model), 0, cells=1)
    assert state(model) == before
    monkeypatch.setattr(type(model.head), "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        explain(model, video)
    for method in (occlusion, grad_cam):
        with pytest.raises(ZeroDivisionError):
            method(model, clips_of(model), 0)
    assert state(model) == before


def test_of_an_optimized_model(classifier, video):
    fast = tpn.optimize(tpn.create_model(NAME, pretrained=True), torch.bfloat16)
    explanation, expected = (explain(model, video, method="grad-cam") for model in (fast, classifier))
    assert explanation.maps[0].dtype == torch.float32
    assert explanation.target == expected.target
    assert float((explanation.maps[0] * expected.maps[0]).sum() / explanation.maps[0].norm() / expected.maps[0].norm()) > 0.9


def test_errors(classifier, video, monkeypatch):
    """Those about arguments come before the video is read."""
    with pytest.raises(ValueError, match="'growin'.* 'growing', '"):
        explain(classifier, "none.mp4", target="growin")
    with pytest.raises(ValueError, match=r"target .* 0\.\.13, got 14"):
        explain(classifier, "none.mp4", target="14")
    for target in (14, -1, True):
        with pytest.raises(ValueError, match=rf"target .* 0\.\.13, got {target}"):
            explain(classifier, "none.mp4", target=target)
    with pytest.raises(ValueError, match=r"clip .* 0\.\.2, got 3"):
        explain(classifier, "none.mp4", clip=3)
    with pytest.raises(ValueError, match="method .*'occlusion', 'grad-cam', got 'cam'"):
        explain(classifier, "none.mp4", method="cam")
    with pytest.raises(ValueError, match="num_classes=0"):
        explain(tpn.create_model(NAME, num_classes=0), video)
    with pytest.raises(TypeError, match="TPNClassifier, got str"):
        explain(NAME, video)
    with pytest.raises(TypeError, match="TPNClassifier, got ReLU"):
        grad_cam(nn.ReLU(), torch.zeros(1), 0)
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(ImportError, match=r'captum missing: pip install "tpn\[explain\]"'):
        explain(classifier, "none.mp4", method="grad-cam")


def test_overlay():
    """Gray without evidence, also for a map of zeros. Brightest at the maximum."""
    frames = torch.full((2, 3, 4, 5), 100, dtype=torch.uint8)
    heat = torch.zeros(2, 4, 5)
    assert len(np.unique(overlay(frames, heat))) == 1
    heat[1, 2, 3] = 0.01
    painted = overlay(frames, heat)
    assert (painted.shape, painted.dtype) == ((2, 4, 5, 3), np.uint8)
    assert np.argwhere(np.ptp(painted, axis=3)).tolist() == [[1, 2, 3]]
    assert painted[1, 2, 3].sum() > painted[0, 0, 0].sum()


def test_command(video, tmp_path):
    done = run("explain", video, "--class", "growing", "-m", NAME, "--video", "map.mp4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second, *parts = done.stdout.splitlines()
    assert first == str(video)
    assert second.endswith("%  growing")
    assert [line.split()[1] for line in parts] == ["level", "level", "top_down", "bottom_up"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.mp4", "tpn-explain.png"]
    with Image.open(tmp_path / "tpn-explain.png") as picture:
        assert min(picture.size) > 400
    done = run("explain", video, "--class", "flying", "-m", NAME, cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


@pytest.mark.parametrize("options", [["--output", "a.txt"], ["--video", "a.avi"], ["--output", "nowhere/a.png"]], ids=" ".join)
def test_outputs_are_checked_before_the_model_is_built(video, tmp_path, options):
    done = run("explain", video, "-m", "nonsense", *options, cwd=tmp_path)
    folder, _, name = options[1].rpartition("/")
    assert done.returncode == (1 if folder else 2)
    assert (f"error: {folder}: " if folder else f"'{name}'") in " ".join(done.stderr.replace("│", "").split())


@pytest.mark.parametrize("package", ["matplotlib", "captum"])
def test_missing_packages_are_reported_before_the_model_is_loaded(video, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    done = run("explain", video, "-m", "nonsense", "--method", "grad-cam", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, f'error: {package} missing: pip install "tpn[explain]"\n')
