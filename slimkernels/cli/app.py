"""The ``slimkernels`` command: every step of the flow, progress on stderr, tables for people, ``--json`` for machines.

Exit codes: 0 done, 1 an error (one line, ``slimkernels: ...``, on stderr; ``--debug`` shows where), 2 wrong usage,
130 interrupted.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from slimkernels import env
from slimkernels.cli import compression, evaluation, experiments, training
from slimkernels.cli.tune import tune


class _Commands(TyperGroup):
    """Turns what a user can cause into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        if ctx.params.get("debug"):
            return super().invoke(ctx)
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            _complain("interrupted")
            raise typer.Exit(130) from None
        except (ValueError, TypeError, OSError, RuntimeError, ArithmeticError, ImportError, MemoryError) as error:
            _complain((str(error).strip().splitlines() or [type(error).__name__])[0])
            raise typer.Exit(1) from None


def _complain(line: str) -> None:
    where = f"rank {env.rank()}: " if env.rank() else ""
    typer.echo(f"slimkernels: {where}{line}", err=True)


app = typer.Typer(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Pruned and factorized networks as fast as their FLOP count promises.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from slimkernels import __version__

        typer.echo(f"slimkernels {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


_NAMES = {"evaluate": "eval"}
for _command in (
    experiments.demo,
    experiments.info,
    training.train,
    compression.compress,
    training.distill,
    compression.convert,
    compression.explain,
    evaluation.evaluate,
    tune,
    experiments.bench,
    experiments.reproduce,
):
    app.command(_NAMES.get(_command.__name__))(_command)
