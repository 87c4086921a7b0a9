"""The application, common arguments and options, and checks before a model is downloaded."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tpn.cli.console import print_result
from tpn.files import refuse_url, require_writable
from tpn.version import __version__

if TYPE_CHECKING:
    from tpn.config import InputSpec

app = typer.Typer(
    name="tpn",
    help="Temporal Pyramid Networks for action recognition.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

# Groups of commands in `tpn --help`.
USE, TRAIN, EXPORT, MODELS = "Use", "Train", "Export and features", "Models"

DEFAULT_MODEL = "tpn_slowonly_r50_k400"


def complete_model(incomplete: str) -> list[str]:
    """Return the published models whose names begin with a text, with their tags once it has a dot, for shells to complete."""
    from tpn.zoo.names import list_models

    return [name for name in list_models(pretrained="." in incomplete) if name.startswith(incomplete)]


_MODEL_HELP = (
    "Model name (see tpn list), folder of a saved model, or hf-hub:OWNER/NAME. "
    "predict, timeline, demo, and evaluate also take a file of tpn export."
)
ModelArgument = Annotated[str, typer.Argument(help=_MODEL_HELP, autocompletion=complete_model)]
ModelOption = Annotated[str, typer.Option("--model", "-m", help=_MODEL_HELP, autocompletion=complete_model)]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(help="Weights file, .safetensors or .pth, saved by tpn, MMAction2, or the original TPN code."),
]
RootOption = Annotated[Path | None, typer.Option(help="Base folder of the paths in a list. Default: the list's folder.")]
FramesOption = Annotated[
    str | None, typer.Option(help="File names of extracted frames, such as img_{:05d}.jpg, for a list of frame folders.")
]
FirstFrameOption = Annotated[int, typer.Option(min=0, help="Number of the first extracted frame.")]
WorkersOption = Annotated[int, typer.Option(min=1, help="Number of videos to read in parallel.")]
ViewsOption = Annotated[str | None, typer.Option(help="CLIPSxCROPS, such as 1x1. Default: as published.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: cuda if available, otherwise cpu; cpu for exported files.")
]
PrecisionOption = Annotated[
    Literal["float32", "float16", "bfloat16", "auto"] | None,
    typer.Option(
        metavar="NAME",
        help="float32, float16, bfloat16, or auto: float16 on CUDA, bfloat16 on CPUs with AMX or AVX512-BF16, otherwise float32. "
        "Default: float32; for an int8 file auto.",
    ),
]


@app.callback(invoke_without_command=True)
def _app(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print_result(f"tpn {__version__}")
        raise typer.Exit


def examples(*commands: str) -> str:
    """Return the end of a command's help."""
    return "\n\n".join(["Examples:", *commands])


def find_videos(paths: list[Path]) -> tuple[list[tuple[Path, Path]], list[tuple[Path, FileNotFoundError]]]:
    """Return video files and the videos below folders, each with its folder; and folders without videos, each with an error."""
    from tpn.video.lists import videos_below

    files, empty = [], []
    for path in paths:
        refuse_url(path)
        found = videos_below(path) if path.is_dir() else [path]
        files += [(file, path if path.is_dir() else path.parent) for file in found]
        if not found:
            empty.append((path, FileNotFoundError(f"{path}: no videos in this folder")))
    return files, empty


def require_exists(path: str | Path) -> None:
    """Raise FileNotFoundError if `path` does not exist, before the model is downloaded."""
    refuse_url(path)
    os.stat(path)


def require_model(model: str, checkpoint: Path | None = None) -> "InputSpec | None":
    """Raise an error for an unknown model and for weights that need a manual download, before PyTorch is imported.

    Returns:
        The input of a published model; None for a saved model and an exported file.
    """
    from tpn.zoo import names

    if names.is_exported(model) or set(model) & set(":/") or names.is_saved(model):
        return None
    entry = names.get_checkpoint(model)
    if checkpoint is None:
        names.refuse_manual_download(entry)
    return entry.config.input_spec


def require_picture_path(output: Path) -> None:
    """Raise an error if matplotlib cannot write a picture to `output`, before the model is downloaded."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if output.suffix.removeprefix(".").lower() not in formats:
        raise typer.BadParameter(f"must end in .png, .svg, or another picture format, got {str(output)!r}", param_hint="--output")
    require_writable(output)


def parse_views_option(views: str | None) -> tuple[int | None, int | None]:
    """Parse --views to (num_clips, num_crops), or (None, None) for the published views."""
    from tpn.config import parse_views

    if views is None:
        return None, None
    try:
        return parse_views(views)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--views") from error
