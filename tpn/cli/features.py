"""The command features."""

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tpn.cli.app import (
    DEFAULT_MODEL,
    EXPORT,
    CheckpointOption,
    DeviceOption,
    ModelOption,
    ViewsOption,
    app,
    examples,
    find_videos,
    parse_views_option,
    require_exists,
    require_model,
)
from tpn.cli.console import err, print_result, progress_bars
from tpn.cli.script import one_line_message
from tpn.errors import plural

if TYPE_CHECKING:
    from tpn.predict import Unreadable


@app.command(
    rich_help_panel=EXPORT,
    epilog=examples(
        "tpn features video.mp4 --output features.npz",
        "tpn features videos --output windows --stride 16 --dtype float16",
    ),
)
def features(
    videos: Annotated[list[Path], typer.Argument(help="Video files, or folders to search for them.", metavar="VIDEO...")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write, .npz or .parquet; with --stride, also a folder.")
    ],
    model: ModelOption = DEFAULT_MODEL,
    checkpoint: CheckpointOption = None,
    feature: Annotated[
        str | None,
        typer.Option(
            help="Feature map to average over time and space: c4, c5, top_down_fusion, ... Default: the one that is classified."
        ),
    ] = None,
    level: Annotated[
        Literal["video", "clip"] | None, typer.Option(help="Write one row per video or one per clip. Default: video.")
    ] = None,
    views: ViewsOption = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Write one row per window: frames from the start of a window to that of the next.")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=1, help="The model's frames times the step between them. Default: as published. Needs --stride."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16"] | None, typer.Option(help="Type of the .npy files. Default: float32. Needs --stride.")
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Write the features of videos to a file, or with --stride those of a sliding window to a folder.

    Run the same command again to resume. Videos whose features are already there are skipped.
    """
    import torch

    from tpn.devices import resolve_device
    from tpn.features import FeatureModel, check_folder, check_path, extract, is_table
    from tpn.predict import VideoClassifier
    from tpn.strided import extract_windows, window_spec
    from tpn.zoo.create import create_model

    num_clips, num_crops = parse_views_option(views)
    _check_options(stride, {"--window": window, "--dtype": dtype}, {"--level": level, "--views": views})
    if stride is None or is_table(output):
        check_path(output)  # before the model is downloaded
    else:
        check_folder(output)
    names, num_empty = _find_videos(videos)
    if not names:
        raise typer.Exit(1)
    if not output.exists() and not any(Path(path).exists() for path in names):  # existing features may be those of deleted videos
        require_exists(next(iter(names)))
    published = require_model(model, checkpoint)
    if published is not None and stride is not None:
        window_spec(published, window)
    torch_device = resolve_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    built = create_model(model, checkpoint is None, checkpoint_path=checkpoint)
    try:
        feature_model = FeatureModel(built.eval(), feature)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--feature") from error
    classifier = VideoClassifier(feature_model, device=torch_device)
    if stride is None:
        results = extract(classifier, names, output, name=model, level=level or "video", num_clips=num_clips, num_crops=num_crops)
    else:
        results = extract_windows(classifier, names, output, name=model, stride=stride, window=window, dtype=dtype or "float32")
    failed = _report(results, output, len(names))
    if failed or num_empty:
        raise typer.Exit(1)


def _check_options(stride: int | None, of_windows: dict[str, object], of_views: dict[str, object]) -> None:
    wrong = of_windows if stride is None else of_views
    given = [name for name, value in wrong.items() if value is not None]
    if given:
        raise typer.BadParameter("needs --stride" if stride is None else "is not valid with --stride", param_hint=given[0])


def _find_videos(videos: list[Path]) -> tuple[dict[str, str], int]:
    """Return the files with the names of their features, paths below a given folder without suffix, and report empty folders."""
    files, empty = find_videos(videos)
    for _, error in empty:
        err.print(f"error: {error}")
    names: dict[str, str] = {}
    for file, folder in files:
        names.setdefault(str(file), file.relative_to(folder).with_suffix("").as_posix())
    return names, len(empty)


def _report(results: "Generator[tuple[str, Unreadable | None]]", out: Path, num_videos: int) -> int:
    """Run the extraction, and print what happened. Return the number of unreadable videos."""
    added = failed = 0
    with progress_bars() as progress:
        try:
            for _, error in progress.track(results, total=None, description="files"):
                if error is None:
                    added += 1
                else:
                    failed += 1
                    err.print(f"error: {one_line_message(error)}")
        except KeyboardInterrupt:
            results.close()
            err.print(f"interrupted; added {plural(added, 'video')} to {out}. Run the same command to resume.")
            raise
    print_result(f"{out}: {plural(added, 'video')} added, {num_videos - added - failed} already there, {failed} unreadable")
    return failed
