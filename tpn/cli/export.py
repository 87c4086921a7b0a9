"""The command that writes models for other programs: export."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

import tpn
from tpn.cli.app import app, check_folder, err, read_views

Format = Literal["onnx", "pt2"]


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A name from tpn list, local-dir:FOLDER or hf-hub:OWNER/NAME.")],
    format: Annotated[
        Format | None,
        typer.Option("--format", "-f", help="onnx, for runtimes without PyTorch, the default; pt2, a program of torch.export."),
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights file, .safetensors or .pth.")] = None,
    pretrained: Annotated[bool, typer.Option(help="Load the published weights, where there is no --checkpoint.")] = True,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: the model's name, here.")] = None,
    views: Annotated[str | None, typer.Option(help="CLIPSxCROPS to be seen, such as 1x1. Default: as published.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of the clips in pixels. Default: as published.")] = None,
    num_classes: Annotated[int | None, typer.Option(help="With another number than the weights', the classifier is new.")] = None,
) -> None:
    """Write a model as one file that holds all it takes to run, and check it against the model."""
    from tpn import export as exporting

    named: dict[str, Format] = {".onnx": "onnx", ".pt2": "pt2"}
    if output is not None and output.suffix not in named:
        raise typer.BadParameter(f"a file's name ends in .onnx or .pt2, got {str(output)!r}", param_hint="--output")
    of_file = named[output.suffix] if output is not None else None
    if None not in (format, of_file) and format != of_file:
        raise typer.BadParameter(f"{format} is not what {str(output)!r} ends in", param_hint="--format")
    format = format or of_file or "onnx"
    if format == "onnx":
        exporting.need_packages("onnx", "onnxscript", "onnxruntime")
    num_clips, num_crops = read_views(views)
    output = output or Path(f"{Path(model.partition(':')[2] or model).name or 'model'}.{format}")
    check_folder(output)
    built = tpn.create_model(model, pretrained and checkpoint is None, checkpoint_path=checkpoint, num_classes=num_classes).eval()
    if num_classes and built.labels is None and pretrained and checkpoint is None and ":" not in model:
        err.print(f"the weights are for another number of classes: the classifier for {num_classes} is new and untrained")
    if num_clips is not None and num_crops is not None:
        built.input_spec = replace(built.input_spec, num_clips=num_clips, num_crops=num_crops, flip=False)
    write = exporting.export_onnx if format == "onnx" else exporting.export_pt2
    with exporting.whole(output) as unchecked:
        write(built, unchecked, size=size)
        err.print("written; now its results are compared with the model's")
        difference = exporting.max_difference(built, unchecked)
        if not difference < exporting.TOLERANCE:  # not a number is no pass either
            raise ValueError(f"no file: what it computes differs from the model by {difference:.1e} of the largest logit")
    megabytes = output.stat().st_size / 1e6
    typer.echo(f"{output}  {megabytes:.1f} MB, largest difference of a logit {difference:.1e} of the largest logit")
