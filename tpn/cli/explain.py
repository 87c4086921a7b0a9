"""The command explain."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from tpn.cli.app import (
    DEFAULT_MODEL,
    USE,
    CheckpointOption,
    DeviceOption,
    ModelOption,
    app,
    examples,
    require_exists,
    require_model,
    require_picture_path,
)
from tpn.cli.console import err, print_result
from tpn.files import require_writable
from tpn.validation import need_packages


@app.command(
    rich_help_panel=USE,
    epilog=examples("tpn explain video.mp4", 'tpn explain video.mp4 --class "arm wrestling" --video explained.mp4'),
)
def explain(
    video: Annotated[Path, typer.Argument(help="Video file.")],
    target: Annotated[
        str | None, typer.Option("--class", "-c", help="Class to explain, by name or index. Default: the most probable one.")
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    checkpoint: CheckpointOption = None,
    clip: Annotated[
        int | None, typer.Option(help="Index of a clip of the published protocol, from 0. Default: a clip from the middle.")
    ] = None,
    method: Annotated[
        Literal["occlusion", "grad-cam"],
        typer.Option(help="occlusion stops the motion in one part of the clip at a time. grad-cam is faster but less precise."),
    ] = "occlusion",
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture to write.")] = Path("tpn-explain.png"),
    video_output: Annotated[Path | None, typer.Option("--video", help="Also write the maps as a video, .mp4.")] = None,
    device: DeviceOption = None,
) -> None:
    """Draw the evidence for a class in a clip, level by level.

    Also print what each level and each flow of the pyramid adds to the logit of the class.
    """
    from tpn.explain import explain as explain_clip
    from tpn.predict import VideoClassifier

    need_packages("matplotlib", *(["captum"] if method == "grad-cam" else []), extra="explain")
    require_exists(video)
    require_picture_path(output)
    if video_output is not None:
        if video_output.suffix.lower() != ".mp4":
            raise typer.BadParameter(f"must end in .mp4, got {str(video_output)!r}", param_hint="--video")
        require_writable(video_output)
    require_model(model, checkpoint)
    classifier = VideoClassifier(model, checkpoint_path=checkpoint, device=device)
    explanation = explain_clip(classifier, video, target=target, clip=clip, method=method)
    print_result(str(video))
    print_result(f"  {explanation.probability:7.2%}  {explanation.label}")
    levels = {f"level {i}": share for i, share in enumerate(explanation.levels)}
    for name, share in (levels | dict(explanation.flows)).items():
        print_result(f"  {share.logit:+7.2f}  {name} ({share.share:.0%})")
    if not any(heat.any() for heat in explanation.maps):
        err.print("the maps are empty: the class does not depend on where this clip moves")
    explanation.save_png(output)
    err.print(f"wrote {output}")
    if video_output is not None:
        explanation.save_mp4(video_output)
        err.print(f"wrote {video_output}")
