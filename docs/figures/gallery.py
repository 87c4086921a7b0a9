"""Make the pictures of the gallery: follow fish in two videos, train on the first, and show the second.

    python docs/figures/gallery.py test_A.avi test_B.avi --work gallery

Both videos come with idtracker.ai 6.0.9, in `src/idtrackerai/data` of its source package on PyPI. The first run takes about
10 minutes on two cores. Later runs use what is in the folder `--work`, and only draw again.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from tpn.video import decode
from tpn.video.crops import crop_frame, square_boxes
from tpn.video.encode import write_video
from tpn.video.tracks import Track, read_tracks
from tpn.video.transforms import resize_short_side

Array = NDArray[np.floating]

FPS = 28.07
WINDOW, STEP = 32, 6
"""Frames that are labeled together, and from one window to the next."""
BOX = 72
"""Side of the box around a fish, in pixels."""
MIN_TRACK, MAX_ABSENCE = 32, 5
"""Frames of the shortest track, and frames without a fish after which a track ends."""
STRAIGHT, TURN = 20, 60
"""Change of direction within a window, in degrees: below the first, a fish swims straight; above the second, it turns."""
MOVING, AREA = range(376, 500, 2), (slice(0, 500), slice(280, 1050))
"""Frames, rows and columns of the animation."""
EXPLAINED = "fish/val/right/11_275.mp4"
TRAIN = "train fish --output runs/fish --model tpn_slowonly_tiny_motion --steps 400 --val-interval 4 --workers 1 --flip-prob 0"


def find_fish(frames: Sequence[Array]) -> Iterator[Array]:
    """Yield the centers (N, 2) of the fish in each gray frame: regions darker than the background, of the size of one fish."""
    background = np.median(frames[::20], axis=0)
    for frame in frames:
        regions, count = ndimage.label(ndimage.gaussian_filter(background - frame, 1) > 25)
        numbers = np.arange(1, count + 1)
        sizes = ndimage.sum_labels(regions > 0, regions, numbers)
        single = numbers[(sizes > 80) & (sizes < 750)]
        yield np.array(ndimage.center_of_mass(regions > 0, regions, single)).reshape(-1, 2)[:, ::-1]


def follow(centers: Iterator[Array]) -> list[list[tuple[int, Array]]]:
    """Join centers to tracks. A track goes to the fish nearest to where its last centers lead."""
    tracks: list[list[tuple[int, Array]]] = []
    for number, found in enumerate(centers):
        near = []
        for i, track in enumerate(tracks):
            (earlier, before), (last, center) = track[-min(len(track), 4)], track[-1]
            if (absence := number - last) <= MAX_ABSENCE:
                expected = center + (center - before) / max(last - earlier, 1) * absence
                distances = np.linalg.norm(found - expected, axis=-1)
                near += [(d, i, j) for j, d in enumerate(distances) if d < 25 + 8 * absence]
        free = set(range(len(found)))
        for _, i, j in sorted(near):
            if j in free and tracks[i][-1][0] < number:
                free.remove(j)
                tracks[i].append((number, found[j]))
        tracks += [[(number, found[j])] for j in sorted(free)]
    return [track for track in tracks if len(track) >= MIN_TRACK]


def write_tracks(video: Path, path: Path) -> None:
    """Find and follow the fish of a video, and write MOT text."""
    frames = [frame[0].numpy().astype(np.float32) for frame in decode.iter_frames(video)]
    lines = [
        f"{number + 1},{id},{x - BOX / 2:.0f},{y - BOX / 2:.0f},{BOX},{BOX},1,-1,-1,-1\n"
        for id, track in enumerate(follow(find_fish(frames)), 1)
        for number, (x, y) in track
    ]
    path.write_text("".join(lines))


def label(boxes: Array) -> str | None:
    """Return what a fish does whose boxes (WINDOW, 4) these are, or None if it is between two classes."""
    positions = ndimage.uniform_filter1d((boxes[:, :2] + boxes[:, 2:]) / 2, 5, axis=0)
    directions = np.unwrap(np.arctan2(*np.diff(positions, axis=0).T[::-1]))
    turn = np.degrees(directions[-5:].mean() - directions[:5].mean())
    if abs(turn) < STRAIGHT:
        return "straight"
    return None if abs(turn) < TURN else "right" if turn > 0 else "left"


def crops(video: Path, track: Track) -> list[NDArray[np.uint8]]:
    """Return the crops (96, 96, 3) of a track that tpn makes."""
    numbers, boxes = square_boxes(track)
    squares = (
        crop_frame(frame, box) for frame, box in zip(decode.iter_frames(video, indices=numbers.tolist()), boxes, strict=True)
    )
    return [resize_short_side(square, 96).permute(1, 2, 0).numpy() for square in squares]


def write_clips(video: Path, tracks: Sequence[Track], folder: Path) -> None:
    """Write each labeled window as a video of its crops, FOLDER/CLASS/TRACK_FRAME.mp4."""
    for track in tracks:
        images, boxes = crops(video, track), track.filled()
        for start in range(0, len(images) - WINDOW + 1, STEP):
            if name := label(boxes[start : start + WINDOW]):
                (folder / name).mkdir(parents=True, exist_ok=True)
                path = folder / name / f"{track.id:02d}_{track.first + start:03d}.mp4"
                write_video(path, images[start : start + WINDOW], fps=FPS)


def run(work: Path, command: str, *results: str) -> None:
    """Run a command of tpn in the folder, unless its results are there. What it prints goes to a text file."""
    if not all((work / result).exists() for result in results):
        print(f"tpn {command}", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "tpn", *command.split()], cwd=work, stdout=subprocess.PIPE, text=True, check=True
        )
        (work / f"{command.split()[0]}.txt").write_text(done.stdout)


def write_moving(annotated: Path, path: Path) -> None:
    """Write a part of the annotated video as an animation. Pixels that hardly change keep their value, which saves space."""
    shown: list[NDArray[np.int16]] = []
    for frame in decode.iter_frames(annotated, indices=MOVING):
        image = frame.permute(1, 2, 0).numpy()[AREA].astype(np.int16)
        if shown:
            same = ndimage.maximum_filter(np.abs(image - shown[-1]).max(-1), 5) < 16
            image = np.where(same[..., None], shown[-1], image)
        shown.append(image)
    first, *others = (Image.fromarray(image.astype(np.uint8)) for image in shown)
    first.save(path, save_all=True, append_images=others, duration=round(1000 * MOVING.step / FPS), loop=0, quality=40, method=6)


def write_picture(source: Path, path: Path, width: int) -> None:
    """Write a still picture as WebP, not wider than `width` pixels."""
    image = Image.open(source).convert("RGB")
    image.thumbnail((width, 10_000), Image.Resampling.LANCZOS)
    image.save(path, quality=85, method=6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path, help="test_A.avi")
    parser.add_argument("show", type=Path, help="test_B.avi")
    parser.add_argument("--work", type=Path, default=Path("gallery"), help="folder for the model and everything on the way")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "pages" / "figures")
    args = parser.parse_args()
    work, output = args.work, args.output
    work.mkdir(parents=True, exist_ok=True)
    for split, video in (("train", args.train), ("val", args.show)):
        if not (tracks := work / f"{split}.txt").exists():
            write_tracks(video, tracks)
            write_clips(video, read_tracks(tracks), work / "fish" / split)
    longest = max(read_tracks(work / "val.txt"), key=len)
    if not (work / "one.mp4").exists():
        write_video(work / "one.mp4", crops(args.show, longest), fps=FPS)
    run(work, TRAIN, "runs/fish/report.html")
    run(work, "evaluate runs/fish fish/val --output runs/fish/val", "runs/fish/val/summary.json")
    shown = f"timeline {args.show.resolve()} --tracks val.txt --model runs/fish --stride 4 --annotate annotated.mp4"
    run(work, shown, "annotated.mp4")
    run(work, "timeline one.mp4 --model runs/fish --stride 2 --output timeline.png", "timeline.png")
    run(work, f"explain {EXPLAINED} --model runs/fish --output explain.png", "explain.png")
    write_moving(work / "annotated.mp4", output / "gallery_tracks.webp")
    write_picture(work / "timeline.png", output / "gallery_timeline.webp", 1400)
    write_picture(work / "explain.png", output / "gallery_explain.webp", 1600)
    report = output / "gallery_report.html"
    report.write_text((work / "runs/fish/report.html").read_text().replace(f"{work.resolve()}/", ""))
    if (browser := shutil.which("chromium")) is not None:
        picture = work.resolve() / "report.png"
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1100,900", f"--screenshot={picture}"]
        subprocess.run([browser, *options, report.resolve().as_uri()], check=True, capture_output=True)
        write_picture(picture, output / "gallery_report.webp", 1100)


if __name__ == "__main__":
    main()
