"""The ``slimkernels`` command: ``app`` holds its subcommands, the other modules what those run and print."""


def main() -> None:
    """Entry point of the ``slimkernels`` command."""
    from slimkernels.cli.app import app

    app()
