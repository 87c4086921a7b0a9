"""The command features."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from tpn.cli.app import (
    DEFAULT_MODEL,
    CheckpointOption,
    DeviceOption,
    ModelOption,
    ViewsOption,
    app,
    err,
    parse_views_option,
    print_result,
    progress_bars,
    require_exists,
)
from tpn.cli.script import one_line_message


@app.command()
def features(
    videos: Annotated[list[Path], typer.Argument(help="Video files, or folders to search for them.", metavar="VIDEO...")],
    out: Annotated[Path, typer.Option(help="File to write, .npz or .parquet.")],
    model: ModelOption = DEFAULT_MODEL,
    checkpoint: CheckpointOption = None,
    feature: Annotated[
        str | None,
        typer.Option(
            help="Feature map to average over time and space: c4, c5, top_down_fusion, ... Default: the one that is classified."
        ),
    ] = None,
    level: Annotated[Literal["video", "clip"], typer.Option(help="Write one row per video or one per clip.")] = "video",
    views: ViewsOption = None,
    device: DeviceOption = None,
) -> None:
    """Write the features of videos to a file.

    Run the same command again to resume. Videos that are already in the file are skipped.
    """
    import torch

    from tpn.devices import resolve_device
    from tpn.features import FeatureModel, check_path, extract
    from tpn.predict import VideoClassifier
    from tpn.video.datasets import videos_below
    from tpn.zoo.create import create_model

    num_clips, num_crops = parse_views_option(views)
    check_path(out)  # before the model is downloaded
    files_of = {video: videos_below(video) if video.is_dir() else [video] for video in videos}
    paths = [path for files in files_of.values() for path in files]
    empty_folders = [video for video, files in files_of.items() if not files]
    for folder in empty_folders:
        err.print(f"error: {folder}: no videos in this folder")
    if not paths:
        raise typer.Exit(1)
    if not out.exists() and not any(path.exists() for path in paths):  # an existing file may have the rows of deleted videos
        require_exists(paths[0])
    torch_device = resolve_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    built = create_model(model, checkpoint is None, checkpoint_path=checkpoint)
    classifier = VideoClassifier(FeatureModel(built.eval(), feature), device=torch_device)
    added = failed = 0
    with progress_bars() as progress:
        results = extract(classifier, paths, out, name=model, level=level, num_clips=num_clips, num_crops=num_crops)
        try:
            for _, error in progress.track(results, total=None, description="files"):
                if error is None:
                    added += 1
                else:
                    failed += 1
                    err.print(f"error: {one_line_message(error)}")
        except KeyboardInterrupt:
            results.close()
            err.print(f"interrupted; added {added} videos to {out}. Run the same command to resume.")
            raise
    skipped = len(set(paths)) - added - failed
    print_result(f"{out}: {added} videos added, {skipped} already there, {failed} unreadable")
    if failed or empty_folders:
        raise typer.Exit(1)
