"""`tpn features`: what a model makes of videos, for other programs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

import tpn
from tpn.cli.app import app, check_there, err, one_line, progress_bars, read_views

Level = Literal["video", "clip"]


@app.command()
def features(
    videos: Annotated[list[Path], typer.Argument(help="Video files, or folders of them.", metavar="VIDEO...")],
    out: Annotated[Path, typer.Option(help="Where to write them: FILE.npz or FILE.parquet.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="A name from tpn list, local-dir:FOLDER or hf-hub:OWNER/NAME.")
    ] = "tpn_slowonly_r50_k400",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights file, .safetensors or .pth, ours, MMAction2's or the original TPN's.")
    ] = None,
    feature: Annotated[
        str | None,
        typer.Option(
            help="Another map than the one that is classified: c4, c5, top_down_fusion, ...; averaged over time and space."
        ),
    ] = None,
    level: Annotated[Level, typer.Option(help="A row for each video, or for each clip of it.")] = "video",
    views: Annotated[str | None, typer.Option(help="CLIPSxCROPS, such as 1x1. Default: as published.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: a GPU if there is one.")] = None,
) -> None:
    """Write the features of videos into a file. The same command again goes on where it was stopped."""
    import torch

    from tpn.features import FeatureModel, check_path, extract
    from tpn.optimize import usable_device
    from tpn.predict import VideoClassifier
    from tpn.video.datasets import videos_below

    num_clips, num_crops = read_views(views)
    check_path(out)  # before the model is fetched
    found = {video: videos_below(video) if video.is_dir() else [video] for video in videos}
    paths = [path for inside in found.values() for path in inside]
    empty = [video for video, inside in found.items() if not inside]
    for video in empty:
        err.print(f"error: {video}: no videos in it")
    if not paths:
        raise typer.Exit(1)
    if not out.exists():  # which may hold what is gone
        check_there(*paths)
    place = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    built = tpn.create_model(model, checkpoint is None, checkpoint_path=checkpoint)
    classifier = VideoClassifier(FeatureModel(built.eval(), feature), device=place)
    done = failed = 0
    with progress_bars() as progress:
        results = extract(classifier, paths, out, name=model, level=level, num_clips=num_clips, num_crops=num_crops)
        try:
            for _, problem in progress.track(results, total=None, description="files"):
                if problem is None:
                    done += 1
                else:
                    failed += 1
                    err.print(f"error: {one_line(problem)}")
        except KeyboardInterrupt:
            results.close()
            err.print(f"interrupted; {done} videos were added to {out}, and the same command goes on from there")
            raise
    before = len(set(paths)) - done - failed
    typer.echo(f"{out}: {done} videos added, {before} were there already, {failed} cannot be read")
    if failed or empty:
        raise typer.Exit(1)
