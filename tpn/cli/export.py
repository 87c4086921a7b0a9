"""The command export."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from tpn.cli.app import (
    EXPORT,
    CheckpointOption,
    FirstFrameOption,
    FramesOption,
    ModelArgument,
    RootOption,
    ViewsOption,
    app,
    examples,
    parse_views_option,
    require_model,
)
from tpn.cli.console import err, print_result
from tpn.files import atomic_write, require_writable
from tpn.validation import need_packages

Format = Literal["onnx", "pt2", "openvino"]
FORMAT_OF_SUFFIX: dict[str, Format] = {".onnx": "onnx", ".pt2": "pt2", ".xml": "openvino"}
SUFFIX_OF_FORMAT = {format: suffix for suffix, format in FORMAT_OF_SUFFIX.items()}


@app.command(
    rich_help_panel=EXPORT,
    epilog=examples(
        "tpn export tpn_slowonly_r50_k400 --format openvino",
        "tpn export local-dir:my-tpn --output my-tpn.xml --int8 --calibrate videos",
    ),
)
def export(
    model: ModelArgument,
    format: Annotated[
        Format | None,
        typer.Option(
            "--format",
            "-f",
            help="onnx for runtimes without PyTorch, pt2 for torch.export, openvino for CPUs. "
            "Default: the suffix of --output, otherwise onnx.",
        ),
    ] = None,
    checkpoint: CheckpointOption = None,
    pretrained: Annotated[bool, typer.Option(help="Load the published weights if there is no --checkpoint.")] = True,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write, .onnx, .pt2, or .xml. Default: the model's name.")
    ] = None,
    views: ViewsOption = None,
    size: Annotated[int | None, typer.Option(help="Height and width of the clips in pixels. Default: as published.")] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Number of classes. If the weights have another number, the classifier is untrained.")
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Compute in int8, the fastest on CPUs. Needs --format openvino and --calibrate.")
    ] = False,
    calibrate: Annotated[
        Path | None,
        typer.Option(exists=True, help="Videos to calibrate int8 with, in any form that tpn train reads. 400 are enough."),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Leave layers out of int8 until the accuracy on held-back videos drops by at most this share."
        ),
    ] = None,
    root: RootOption = None,
    frames: FramesOption = None,
    first_frame: FirstFrameOption = 1,
) -> None:
    """Export a model to one file and compare its results with those of the model.

    The file contains the weights, class names, sampling, and transform. Its name can replace a model's in predict, timeline, and
    evaluate. OpenVINO keeps the weights in a second file, .bin.
    """
    from tpn import export as exporting
    from tpn.zoo.create import create_model
    from tpn.zoo.names import is_saved

    if output is not None and output.suffix not in FORMAT_OF_SUFFIX:
        raise typer.BadParameter(f"must end in .onnx, .pt2, or .xml, got {str(output)!r}", param_hint="--output")
    suffix_format = FORMAT_OF_SUFFIX[output.suffix] if output is not None else None
    if format is not None and suffix_format is not None and format != suffix_format:
        raise typer.BadParameter(f"{format} does not match the suffix of --output {output}", param_hint="--format")
    format = format or suffix_format or "onnx"
    if int8 and format != "openvino":
        raise typer.BadParameter(f"is for OpenVINO, got {format}; add --format openvino", param_hint="--int8")
    if int8 and calibrate is None:
        raise typer.BadParameter("needs videos to calibrate with: --calibrate FOLDER", param_hint="--int8")
    first = None if first_frame == 1 else first_frame
    given = {"--calibrate": calibrate, "--max-drop": max_drop, "--root": root, "--frames": frames, "--first-frame": first}
    if not int8 and (unused := [name for name, value in given.items() if value is not None]):
        raise typer.BadParameter("needs --int8", param_hint=", ".join(unused))
    if format == "openvino":
        need_packages("openvino", *(["nncf"] if int8 else []), extra="openvino")
    elif format == "onnx":
        need_packages("onnx", "onnxscript", "onnxruntime")
    num_clips, num_crops = parse_views_option(views)
    output = output or Path(f"{Path(model.partition(':')[2] or model).name or 'model'}{SUFFIX_OF_FORMAT[format]}")
    require_writable(output)
    if pretrained:
        require_model(model, checkpoint)
    built = create_model(model, pretrained and checkpoint is None, checkpoint_path=checkpoint, num_classes=num_classes).eval()
    if num_classes and built.labels is None and pretrained and checkpoint is None and not is_saved(model):
        err.print(f"the weights have another number of classes, so the classifier for {num_classes} classes is untrained")
    built.input_spec = built.input_spec.with_views(num_clips, num_crops)
    with atomic_write(output) as unchecked:
        if format == "openvino":
            report = exporting.export_openvino(
                built,
                unchecked,
                size=size,
                calibrate=calibrate,
                max_drop=max_drop,
                root=root,
                template=frames,
                first=first_frame,
            )
        else:
            report = None
            (exporting.export_onnx if format == "onnx" else exporting.export_pt2)(built, unchecked, size=size)
        if report is None:
            err.print("exported; comparing its results with those of the model")
            difference = exporting.max_difference(built, unchecked)
            if not difference < exporting.TOLERANCE:  # also if it is NaN
                raise ValueError(
                    f"{output} was not written: its logits differ from the model's by {difference:.1e} of the largest logit"
                )
            result = f"largest difference of a logit {difference:.1e} of the largest logit"
        else:
            result = str(report)
            if report.held_back < exporting.quantization.FEW:
                err.print(f"{report.held_back} held-back clips say little; {exporting.quantization.FEW} or more are better")
    files = [output, output.with_suffix(".bin")] if format == "openvino" else [output]
    size_mb = sum(file.stat().st_size for file in files) / 1e6
    print_result(f"{output}  {size_mb:.1f} MB, {result}")
