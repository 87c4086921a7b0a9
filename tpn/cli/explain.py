"""The command that says why: explain."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from tpn.cli.app import app, check_picture, check_there, err


@app.command()
def explain(
    video: Annotated[Path, typer.Argument(help="A video file.")],
    target: Annotated[
        str | None, typer.Option("--class", "-c", help="A class, its name or number. Default: the most probable one.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="A name from tpn list, local-dir:FOLDER or hf-hub:OWNER/NAME.")
    ] = "tpn_slowonly_r50_k400",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights file, .safetensors or .pth.")] = None,
    clip: Annotated[int | None, typer.Option(help="Which clip of the protocol, from 0. Default: one from the middle.")] = None,
    method: Annotated[
        Literal["occlusion", "grad-cam"],
        typer.Option(help="occlusion: paint over one part after the other; or grad-cam: faster, points less well."),
    ] = "occlusion",
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the picture.")] = Path("tpn-explain.png"),
    movie: Annotated[Path | None, typer.Option("--video", help="Also write the maps as a video, .mp4.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: a GPU if there is one.")] = None,
) -> None:
    """Draw where in a clip a class is seen, level by level, and say what each level and flow of the pyramid adds to it."""
    from tpn.demo import can_draw
    from tpn.explain import explain as look_into
    from tpn.predict import VideoClassifier

    if not can_draw():
        raise ModuleNotFoundError('pictures need matplotlib: pip install "tpn[explain]"')
    check_there(video)
    check_picture(output)
    if movie is not None and (movie.suffix.lower() != ".mp4" or not movie.parent.is_dir()):
        raise typer.BadParameter(
            f"must be a file FOLDER/NAME.mp4 in a folder that is there, got {str(movie)!r}", param_hint="--video"
        )
    classifier = VideoClassifier(model, pretrained=checkpoint is None, checkpoint_path=checkpoint, device=device)
    seen = look_into(classifier, video, target=target, clip=clip, method=method)
    typer.echo(f"{video}\n  {seen.probability:7.2%}  {seen.label}")
    for name, part in [*((f"level {i}", part) for i, part in enumerate(seen.levels)), *seen.flows.items()]:
        typer.echo(f"  {part.logit:+7.2f}  {name} ({part.share:.0%})")
    seen.save_png(output)
    err.print(f"drew {output}")
    if movie is not None:
        seen.save_mp4(movie)
        err.print(f"wrote {movie}")
