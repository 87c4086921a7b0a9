"""The command train, whose options are the fields of `TrainConfig`."""

import errno
import inspect
import json
import logging
import os
import shlex
import signal
import sys
import threading
import typing
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import FrameType, NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn

import typer

from tpn.cli.app import TRAIN, app, complete_model, examples, require_exists
from tpn.cli.console import err
from tpn.cli.script import error_message, is_first_process, one_line_message
from tpn.training.config import TrainConfig

SHORT = {"model": "-m"}
COMPLETE = {"model": complete_model}
NEGATED = "no_"


def train(
    data: Annotated[
        str,
        typer.Argument(help="Folder of class folders, folder with such folders named train and val, or list.", metavar="DATA"),
    ],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the model and the report.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in --output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the data and the plan, and stop.")] = False,
    **options: Any,
) -> None:
    """Train a model on your videos, or fine-tune a published one.

    Settings without a default are chosen from the data and the model. --dry-run shows them with their reasons.

    Every switch has an opposite, such as --no-color-jitter.

    Use the result with tpn predict --model OUTPUT. On 8 GPUs: torchrun --nproc-per-node 8 -m tpn train ...
    """
    require_exists(data)
    given = {name: value for name, value in options.items() if value is not None}
    for name in [name for name in given if name.startswith(NEGATED)]:
        given[name.removeprefix(NEGATED)] = not given.pop(name)
    if not is_first_process():
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    from tpn.training import loop  # takes seconds; Ctrl-C has nothing to continue yet

    with advice():
        loop.train(data, output=output, resume=resume, dry_run=dry_run, **given)


@contextmanager
def advice() -> Iterator[None]:
    """Say what to do about faults that do not come from the settings, with the command that continues the run."""
    import torch

    from tpn.training.observer import Interrupted

    again, before = "the same torchrun command with --resume", dict[int, Any]()
    if "RANK" not in os.environ:  # torchrun's processes may be waiting for each other, where no handler runs
        again = shlex.join(["tpn", *(argument for argument in sys.argv[1:] if argument != "--resume"), "--resume"])
        before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    hook = threading.excepthook
    # The run raises a full disk in TensorBoard's thread, too.
    threading.excepthook = lambda failure: None if issubclass(failure.exc_type, OSError) else hook(failure)
    try:
        yield
    except Interrupted as stop:
        _stop(128 + stop.number, f"{stop}; continue with: {again}")
    except torch.OutOfMemoryError as error:
        _stop(1, f"error: {error_message(error)} (--batch-size) with --accumulate, or --checkpointing")
    except (OSError, RuntimeError) as error:
        if str(error).startswith("DataLoader worker (pid"):
            _stop(1, f"error: a loader process was killed, perhaps for memory; continue with fewer --workers: {again}")
        if not any(os.strerror(full) in str(error) for full in (errno.ENOSPC, errno.EDQUOT)):  # libraries lose the number
            raise
        _stop(1, f"error: {one_line_message(error)}; free some space, and continue with: {again}")
    finally:
        threading.excepthook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    from tpn.training.observer import Interrupted

    raise Interrupted(number)


def _stop(code: int, message: str) -> NoReturn:
    err.print(message)
    raise typer.Exit(code)


def options_of(field: "Field[Any]", kind: Any) -> list[inspect.Parameter]:
    """Return a field of `TrainConfig` of some type as an option of the command. Its default is None: the option is not given.

    The --no- form of a switch is an option of its own, so that it takes no column in the help.
    """
    if typing.get_origin(kind) in (UnionType, typing.Union):
        (kind,) = (part for part in typing.get_args(kind) if part is not NoneType)
    about: dict[str, Any] = {"help": field.metadata["help"] + _default(field), "metavar": field.metadata.get("metavar")}
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Mapping:
        kind, about["parser"] = dict, _json_object
    elif origin is tuple and parts[1:] == (...,):
        kind, about["parser"], about["metavar"] = tuple, _integers, about["metavar"] or "N,N,..."
    elif origin is tuple:
        about["metavar"] = about["metavar"] or " ".join("N" for _ in parts)
    elif origin is Literal:
        about["help"] += f" One of {', '.join(parts)}."
        about["metavar"] = about["metavar"] or "NAME"
    elif kind is bool:
        about["metavar"] = " "  # room for the help
    flag = field.name.replace("_", "-")
    names = [f"--{flag}", *([SHORT[field.name]] if field.name in SHORT else [])]
    about["autocompletion"] = COMPLETE.get(field.name)
    option = typer.Option(*names, rich_help_panel=field.metadata["group"], show_default=False, **about)
    options = [_parameter(field.name, kind, option)]
    if kind is bool:
        options.append(_parameter(NEGATED + field.name, kind, typer.Option(f"--no-{flag}", hidden=True)))
    return options


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])


def _default(field: "Field[Any]") -> str:
    """Return a sentence about the default of a field; none for settings that the plan chooses, and for "no"."""
    default = field.default
    if default is MISSING or default is None or default is False:
        return ""
    if default is True:
        return f" Default: yes; --no-{field.name.replace('_', '-')} turns it off."
    return f" Default: {','.join(map(str, default)) if isinstance(default, tuple) else default}."


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"must be JSON, such as '{{\"num_frames\": 16}}', got {text!r}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"must be a JSON object, such as '{{\"num_frames\": 16}}', got {text!r}")
    return value


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"must be integers with commas between them, got {text!r}") from error


def _with_options() -> None:
    """Put the fields of `TrainConfig` in the place of `**options` in the signature of `train`."""
    own, kinds = inspect.signature(train), typing.get_type_hints(TrainConfig)
    parameters = [parameter for parameter in own.parameters.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    parameters += [option for field in fields(TrainConfig) for option in options_of(field, kinds[field.name])]
    train.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    train.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(
        rich_help_panel=TRAIN,
        epilog=examples(
            "tpn train videos --output my-tpn --dry-run",
            "tpn train train.csv --val val.csv --root videos --output my-tpn --epochs 20",
        ),
    )(train)


_with_options()
