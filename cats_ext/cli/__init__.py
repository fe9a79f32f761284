"""The command line ``cats``: one module a command, and what they share in ``common``."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from cats_ext._version import __version__
from cats_ext.cli import streams, torchrun
from cats_ext.cli.commands import bench, chat, demo, env, evaluate, generate, report, serve
from cats_ext.cli.commands.checkpoints import calibrate, exact, finetune, quantize
from cats_ext.cli.common import Command, one_sentence_errors

app = typer.Typer(
    name="cats",
    help="Activation sparsity for the gated MLPs of language models (CATS, arXiv 2404.08763).",
    epilog="Start with: cats demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, command in {
    "demo": demo.demo,
    "calibrate": calibrate.calibrate,
    "generate": generate.generate,
    "chat": chat.chat,
    "eval": evaluate.evaluate,
    "exact": exact.exact,
    "finetune": finetune.finetune,
    "quantize": quantize.quantize,
    "report": report.report,
    "bench": bench.bench,
    "env": env.env,
}.items():
    app.command(name, cls=Command)(one_sentence_errors(command))
app.command("serve", cls=Command, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    one_sentence_errors(serve.serve)
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cats_ext {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error, as CATS_DEBUG=1 does.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    if debug:
        os.environ["CATS_DEBUG"] = "1"


def main() -> None:
    """Entry point of the console script. Exit codes: 0 done, 1 an error in one sentence, 2 wrong usage."""
    try:
        streams.run(app)
    except SystemExit as done:
        if not done.code:  # after an error the other ranks may be in a collective, and ending the group waits for them
            torchrun.end()
        raise
