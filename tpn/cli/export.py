"""The command export."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from tpn.cli.app import CheckpointOption, ViewsOption, app, err, parse_views_option, print_result, require_parent_folder
from tpn.files import atomic_write

Format = Literal["onnx", "pt2"]
FORMAT_OF_SUFFIX: dict[str, Format] = {".onnx": "onnx", ".pt2": "pt2"}


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Model name (see tpn list), folder of a saved model, or hf-hub:OWNER/NAME.")],
    format: Annotated[
        Format | None,
        typer.Option(
            "--format",
            "-f",
            help="onnx for runtimes without PyTorch, pt2 for torch.export. Default: the suffix of --output, otherwise onnx.",
        ),
    ] = None,
    checkpoint: CheckpointOption = None,
    pretrained: Annotated[bool, typer.Option(help="Load the published weights if there is no --checkpoint.")] = True,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write, .onnx or .pt2. Default: the model's name.")
    ] = None,
    views: ViewsOption = None,
    size: Annotated[int | None, typer.Option(help="Height and width of the clips in pixels. Default: as published.")] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Number of classes. If the weights have another number, the classifier is untrained.")
    ] = None,
) -> None:
    """Export a model to one file and compare its results with those of the model.

    The file contains the weights, class names, sampling, and transform.
    """
    from tpn import export as exporting
    from tpn.zoo.create import create_model, is_saved

    if output is not None and output.suffix not in FORMAT_OF_SUFFIX:
        raise typer.BadParameter(f"must end in .onnx or .pt2, got {str(output)!r}", param_hint="--output")
    suffix_format = FORMAT_OF_SUFFIX[output.suffix] if output is not None else None
    if format is not None and suffix_format is not None and format != suffix_format:
        raise typer.BadParameter(f"{format} does not match the suffix of --output {output}", param_hint="--format")
    format = format or suffix_format or "onnx"
    if format == "onnx":
        exporting.need_packages("onnx", "onnxscript", "onnxruntime")
    num_clips, num_crops = parse_views_option(views)
    output = output or Path(f"{Path(model.partition(':')[2] or model).name or 'model'}.{format}")
    require_parent_folder(output)
    built = create_model(model, pretrained and checkpoint is None, checkpoint_path=checkpoint, num_classes=num_classes).eval()
    if num_classes and built.labels is None and pretrained and checkpoint is None and not is_saved(model):
        err.print(f"the weights have another number of classes, so the classifier for {num_classes} classes is untrained")
    built.input_spec = built.input_spec.with_views(num_clips, num_crops)
    write = exporting.export_onnx if format == "onnx" else exporting.export_pt2
    with atomic_write(output) as unchecked:
        write(built, unchecked, size=size)
        err.print("exported; comparing its results with those of the model")
        difference = exporting.max_difference(built, unchecked)
        if not difference < exporting.TOLERANCE:  # also if it is NaN
            raise ValueError(
                f"{output} was not written: its logits differ from the model's by {difference:.1e} of the largest logit"
            )
    megabytes = output.stat().st_size / 1e6
    print_result(f"{output}  {megabytes:.1f} MB, largest difference of a logit {difference:.1e} of the largest logit")
