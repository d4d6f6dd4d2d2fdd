"""``python -m slimkernels``: the ``slimkernels`` command."""

from slimkernels.cli import main

if __name__ == "__main__":
    main()
