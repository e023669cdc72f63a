"""Options that several verbs share, how they become arguments, and how results leave.

One convention for every verb: with `--format json` stdout holds one JSON value and nothing else, a result or `{"error": ...}`;
what people read (progress, warnings, errors) goes to stderr.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from rsrouter.cli.reading import parse_class_names, parse_numbers, parse_resize, parse_shape, parse_sides
from rsrouter.core.errors import InputError

Device = Annotated[
    str, typer.Option("--device", help="Where networks run: cpu, cuda, cuda:1; certify and label also take cuda:0,cuda:2.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of labelling and training.")]
Out = Annotated[Path, typer.Option("--out", help="Where to write; nothing there is overwritten.")]
Alpha = Annotated[float, typer.Option("--alpha", help="Failure probability of each certificate.")]
Radii = Annotated[str, typer.Option("--radii", help="Radii you care about: '0,0.25,0.5' or 'start:stop:step', stop included.")]
Patience = Annotated[
    float | None,
    typer.Option(
        "--patience",
        metavar="P",
        help="Give up on an image if more votes would certify more with at most this chance: .01 (default) to .5. Always sound.",
    ),
]
DEFAULT_RADII = "0:2:0.25"
#: Votes per stage of `certify`, the field's number.
DEFAULT_VOTES = 100_000
#: The bundled images, in place of a path; a folder of that name is ./demo.
DEMO = "demo"
Data = Annotated[str, typer.Option("--data", help="npz, parquet, image folder, hf-hub:org/name@revision, or demo.")]
Start = Annotated[int, typer.Option("--start", min=0, help="First image.")]
Count = Annotated[int | None, typer.Option("--count", min=1, help="How many images; default: all.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub.")]
Licence = Annotated[str, typer.Option("--licence", help="Licence of the router, as the Hub names it.")]
Title = Annotated[str | None, typer.Option("--title", help="Heading of the card.")]


class Format(StrEnum):
    """How a verb prints its result."""

    text = "text"
    json = "json"


#: Modules that the running command imported before loading anything (`--import`).
imported: list[str] = []


def import_modules(names: Iterable[str]) -> None:
    """Imports modules that register architectures; the working directory is searched last.

    Raises:
        InputError: one that cannot be imported.
    """
    import importlib
    import sys

    for name in names:
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))
        try:
            importlib.import_module(name)
        except Exception as error:  # a module may raise what it likes
            raise InputError(
                f"--import {name} failed",
                expected="a module that can be imported, such as my_package.nets",
                received=f"{type(error).__name__}: {error}"[:300],
                remedy="install its package, or run the command where the module lies",
            ) from error
        imported.append(name)


def import_words() -> list[str]:
    """The `--import` options that a further command needs, too."""
    return [word for name in imported for word in ("--import", name)]


def importing(command: Callable[..., None]) -> Callable[..., None]:
    """The verb with one more option, `--import MODULE`, before its `--format`."""
    signature = inspect.signature(command, eval_str=True)

    @wraps(command)
    def verb(*, imports: list[str] | None = None, **arguments: Any) -> None:
        import_modules(imports or ())
        command(**arguments)

    described = typer.Option(
        "--import", metavar="MODULE", help="Import this first: it registers your architectures (repeatable)."
    )
    option = inspect.Parameter(
        "imports", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[list[str] | None, described]
    )
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values()]
    at = len(own) - ("format" in signature.parameters)
    parameters = [*own[:at], option, *own[at:]]
    verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    verb.__annotations__ = {p.name: p.annotation for p in parameters}
    return verb


#: What the running command was asked for; `rsrouter.cli.main` prints errors in the same form.
asked: dict[str, Format] = {}


def _remember(value: Format) -> Format:
    asked["format"] = value
    return value


OutputFormat = Annotated[Format, typer.Option("--format", callback=_remember, help="text for people, json for programs.")]


def _plain(value: Any) -> Any:
    """Numbers that JSON has no word for (NaN, Infinity) as null; arrays, paths and mappings as what JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):  # numpy
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


#: Arguments in Python that are options with the same name.
_OPTIONS = (
    *("architecture", "channels", "classes", "filename", "image", "input_shape", "label", "licence", "mean", "normalisation"),
    *("num_classes", "radii", "sigma", "size", "skip_unreadable", "split", "std", "stream", "validation", "weights_key"),
)
_ARGUMENT = re.compile(
    rf"(?<![\w.-])(?:({'|'.join(_OPTIONS)})=|({'|'.join(o for o in _OPTIONS if '_' in o)})\b)(?:(['\"])(.*?)\3)?"
)
#: What else reads otherwise in a shell.
_PYTHON = {
    "pass token=": "set HF_TOKEN",
    "validation=(images, labels)": "--validation DATA",
    "router='auto'": "--kind auto",
    "(unset HF_HUB_OFFLINE, local_files_only=False)": "(unset HF_HUB_OFFLINE)",
    "images they share (common)": "images they share (--common)",
    "merge what there is with partial": "merge what there is (--partial)",
}


def shell_words(remedy: str) -> str:
    """A remedy with options in place of the arguments of Python.

    >>> shell_words("name it: image= (--image)"), shell_words("or give filename="), shell_words("check input_shape")
    ('name it: --image', 'or give --filename', 'check --input-shape')
    >>> shell_words("leave weights_key out, or give size=224")
    'leave --weights-key out, or give --size 224'
    >>> shell_words("pass validation=(images, labels)")
    'pass --validation DATA'
    """
    for python, shell in _PYTHON.items():
        remedy = remedy.replace(python, shell)
    remedy = re.sub(r"\b\w+=\S* \((--[^)]+)\)", r"\1", remedy)  # where both are said

    def option(found: re.Match[str]) -> str:
        value = found[4] if found[3] else ""
        more = value or (found[1] and remedy[found.end() : found.end() + 1].strip(" ,;.)"))
        return f"--{(found[1] or found[2]).replace('_', '-')}" + (" " if more else "") + value

    return _ARGUMENT.sub(option, remedy)


def echo_json(value: Any) -> None:
    """One JSON value on stdout."""
    typer.echo(json.dumps(_plain(value), allow_nan=False))


def check_out(out: Path | None, option: str = "--out") -> None:
    """Refuses, before any work, an output file whose folder is not there, or that exists: it may be what is read."""
    if out is not None and out.expanduser().is_file():
        raise InputError(
            "The output file exists",
            expected="a new file",
            received=str(out),
            remedy=f"nothing was overwritten; give another {option}",
        )
    if out is not None and (out.is_dir() or not out.expanduser().parent.is_dir()):
        raise InputError(
            "The output file cannot be written",
            expected="a file in a folder that exists",
            received=str(out),
            remedy=f"make the folder first, or give another {option}",
        )


_Numbers = Annotated[str | None, typer.Option(help="One number per channel, such as 0.49,0.48,0.45.")]


def _option_group(options: Callable[..., dict[str, Any]], into: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that gives a verb the options of `options`; the verb gets what that makes of them as the argument `into`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        more = inspect.signature(options, eval_str=True).parameters
        own = inspect.signature(command, eval_str=True).parameters

        @wraps(command)
        def verb(**arguments: Any) -> None:
            given = options(**{name: arguments.pop(name) for name in more})
            command(**arguments, **{into: given})

        # typer reads both
        last = ["format"] if "format" in own else []
        kept = [p.replace(kind=p.KEYWORD_ONLY) for name, p in own.items() if name not in (into, *last)]
        parameters = [*kept, *more.values(), *(own[name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in last)]
        verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        verb.__annotations__ = {p.name: p.annotation for p in parameters}
        return verb

    return decorate


def _checkpoint(
    *,
    filename: Annotated[str | None, typer.Option(help="Weight file, where a folder or repository has several.")] = None,
    architecture: Annotated[
        str | None, typer.Option(help="cifar_resnet110, resnet50, ...: a registered name or one of timm's.")
    ] = None,
    normalisation: Annotated[str | None, typer.Option(help="cifar10, imagenet, none, ...; or give --mean and --std.")] = None,
    mean: _Numbers = None,
    std: _Numbers = None,
    num_classes: Annotated[
        int | None, typer.Option("--num-classes", help="Number of classes (logits), where the file does not say.")
    ] = None,
    input_shape: Annotated[str | None, typer.Option("--input-shape", help="C,H,W, such as 3,32,32.")] = None,
    weights_key: Annotated[
        str | None, typer.Option("--weights-key", help="Which weights to take, where a file holds several (raw, averaged).")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the weights, if their model card does not say.")] = None,
    input_size: Annotated[
        str | None, typer.Option("--input-size", help="Size of the data, 32 or 32x48, where the network takes another size.")
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(
            "--resize", help="How images are resized for the network, if its files do not say: 256:224:bicubic, or none."
        ),
    ] = None,
    class_names: Annotated[
        str | None, typer.Option("--class-names", help="Names of the classes, in the order of the logits: 'cat,dog', or a file.")
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option("--template", help="Prompt of a zero-shot classifier, {} for the class (repeatable).")
    ] = None,
) -> dict[str, Any]:
    given: dict[str, Any] = {
        "filename": filename,
        "architecture": architecture,
        "normalisation": normalisation,
        "num_classes": num_classes,
        "licence": licence,
        "weights_key": weights_key,
        "mean": None if mean is None else parse_numbers(mean, "mean"),
        "std": None if std is None else parse_numbers(std, "std"),
        "input_shape": None if input_shape is None else parse_shape(input_shape),
        "input_size": None if input_size is None else parse_sides(input_size, "input-size"),
        "labels": parse_class_names(class_names),
        "templates": template or None,
    }
    if resize is not None:
        return {**{key: value for key, value in given.items() if value is not None}, "resize": parse_resize(resize)}
    return {key: value for key, value in given.items() if value is not None}


#: Options that describe a checkpoint, as one argument `settings`; what was not said is asked for by `load_expert`, never guessed.
checkpoint_options = _option_group(_checkpoint, "settings")


def _data(
    *,
    split: Annotated[str | None, typer.Option("--split", help="Part of the data: train, validation, test, ...")] = None,
    config: Annotated[str | None, typer.Option("--config", help="Configuration of a data set that has several.")] = None,
    image: Annotated[str | None, typer.Option("--image", help="Column or array of the images.")] = None,
    label: Annotated[str | None, typer.Option("--label", help="Column or array of the labels; none: read no labels.")] = None,
    classes: Annotated[
        str | None, typer.Option("--classes", help="Class names in the experts' order: 'cat,dog', or a file with one per line.")
    ] = None,
    size: Annotated[
        int | None, typer.Option("--size", min=1, help="Resize the short side to SIZE * 256 / 224 and crop the centre to SIZE.")
    ] = None,
    channels: Annotated[
        int | None, typer.Option("--channels", min=1, max=3, help="1 (gray) or 3; default 1 where all pictures are gray.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Read a Hub data set as images are needed; keep no copy.")] = False,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out pictures that cannot be decoded; their names are recorded.")
    ] = False,
) -> dict[str, Any]:
    return {**locals(), "classes": parse_class_names(classes)}


#: Options about how data are read, as one argument `reading`, which `read_data` takes.
data_options = _option_group(_data, "reading")


def read_data(source: str, reading: Mapping[str, Any], demo: str = "test", expert: Any = None) -> Any:
    """`load_data` with a verb's data options, its warnings told on stderr; "demo" is a bundled slice, `--split` or `demo`, and
    "demo:NAME" the one of that name. With an expert, data that name other classes than it has are told as well."""
    from rsrouter.data import load_data

    bundled, _, part = source.partition(":")
    if bundled == DEMO:
        from rsrouter.demo import load_slice

        split = reading.get("split")
        if part and split not in (None, part):
            raise InputError(
                "Two bundled slices are named", expected="one", received=f"{source}, --split {split}", remedy="leave one out"
            )
        return load_slice(part or split or demo)
    with told_warnings():
        data = load_data(source, **reading)
        if expert is not None:
            _compare_classes(data, expert)
    return data


def _compare_classes(data: Any, expert: Any) -> None:
    """Warns where label k of the data is no class k of the experts: a folder with some of ImageNet's classes counts from 0."""
    own, theirs = data.classes, expert.labels
    if own is None or not data.labelled:
        return
    if len(own) < expert.num_classes:
        warnings.warn(
            f"the data name {len(own)} classes, and the experts have {expert.num_classes}: labels count the data's own, from 0 "
            f"({own[0]}). If they are a part of the experts' classes, give all of those names in their order: --classes FILE",
            stacklevel=2,
        )
    elif theirs is not None and tuple(own) != tuple(theirs) and set(own) == set(theirs):
        at = next(k for k, pair in enumerate(zip(own, theirs, strict=True)) if pair[0] != pair[1])
        warnings.warn(
            f"the data's classes stand in another order than the experts': class {at} is {own[at]}, and theirs {theirs[at]}. "
            "Give the names in the experts' order: --classes FILE",
            stacklevel=2,
        )


def readable_rows(data: Any, rows: Iterable[int]) -> list[int]:
    """The rows that are used: all, but for unreadable ones under `--skip-unreadable`."""
    with told_warnings():
        return list(data.readable(rows))


@contextmanager
def told_warnings() -> Iterator[None]:
    """Tells warnings as one line each on stderr, each once and when it comes: a training says its doubts before its hours."""
    from tqdm import tqdm

    said: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if (text := str(message)) not in said:
            said.add(text)
            with tqdm.external_write_mode(file=sys.stderr):
                typer.secho(f"warning: {text}", err=True, fg="yellow")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield
