"""The verbs by name: what each does in a line, and the module that is imported when it is used."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group

from rsrouter.cli.options import importing

#: Verb to its module in `rsrouter.cli` and what `rsrouter --help` says about it, in the order of that page.
VERBS = {
    "demo": ("demo", "Run the whole path offline on bundled Fashion-MNIST experts."),
    "inspect": ("inspect", "Show how a data set is read, before it is used."),
    "wrap": ("experts", "Pin checkpoints into a pool: commits, sha256, sigma, normalisation."),
    "convert": ("experts", "Turn a checkpoint into a folder that can be put on the Hub."),
    "select": ("experts", "Choose the experts over which a perfect router would certify most."),
    "label": ("train", "Draw every expert's votes on every image, for train --labels."),
    "train": ("train", "Train a router over frozen experts for the radii you care about."),
    "certify": ("certify", "Certify a data set into a results table, or a whole run."),
    "predict": ("certify", "Print the smoothed classifier's answer for each image."),
    "transfer": ("transfer", "Carry a table over to another dtype, batch or device."),
    "heads": ("heads", "Certify several last layers of one trunk on the same noisy copies."),
    "report": ("report", "Make one self-contained page from results tables or a run."),
    "merge": ("report", "Merge the shards of one run into one file."),
    "publish": ("publish", "Publish a router, its experts, certificates and card to the Hub."),
    "card": ("publish", "Write what publish would send to a folder on this machine."),
    "audit": ("publish", "Check a router and its certificates."),
    "plan": ("plan", "Show which radius a number of votes can certify, and what it costs."),
    "calibrate": ("execution", "Measure the fastest batch size and dtype on this machine."),
    "bench": ("bench", "Measure speed as ratios to pure forward passes."),
    "doctor": ("doctor", "Check device, versions, caches and the Hub."),
}

#: Verbs that load experts or routers: they take `--import`.
LOADING = {
    *(
        "audit",
        "bench",
        "calibrate",
        "card",
        "certify",
        "convert",
        "heads",
        "label",
        "predict",
        "publish",
        "train",
        "transfer",
        "wrap",
    )
}


class _Loaded(MutableMapping[str, Any]):
    """Verb to command; a verb's module is imported when it is looked up."""

    def __init__(self) -> None:
        self._commands: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._commands:
            module = import_module(f"rsrouter.cli.{VERBS[name][0]}")
            group = typer.Typer(rich_markup_mode=None, add_completion=False)
            group.callback()(lambda: None)
            module.register(group)
            for verb in group.registered_commands:
                verb.cls = Verb
                if verb.callback is not None and (verb.name or verb.callback.__name__) in LOADING:
                    verb.callback = importing(verb.callback)
            self._commands |= get_group(group).commands
        return self._commands[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._commands[name] = command

    def __delitem__(self, name: str) -> None:
        del self._commands[name]

    def __iter__(self) -> Iterator[str]:
        return iter(VERBS)

    def __len__(self) -> int:
        return len(VERBS)


class Verb(TyperCommand):
    """A verb: its help has a section for each panel of options, and loads no library that draws."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, then options by panel, those of no panel first."""
        sections: dict[str, list[Any]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            if (line := parameter.get_help_record(ctx)) is not None:
                plain = "Arguments" if parameter.param_type_name == "argument" else "Options"
                sections.setdefault(getattr(parameter, "rich_help_panel", None) or plain, []).append(line)
        for title, lines in sections.items():
            if lines:
                with formatter.section(title):
                    formatter.write_dl(lines)


class Verbs(TyperGroup):
    """The root command: its help imports no verb."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Loaded()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The words before the verb; a flag that is neither True nor False would load the library that converts values."""
        for parameter in self.get_params(ctx):
            if parameter.default is None and getattr(parameter, "is_flag", False):
                parameter.default = False
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Verbs and their lines."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in VERBS.items()])
