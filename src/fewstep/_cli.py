"""Entry point of the `fewstep` command. Kept apart from the commands so that a missing extra is
one sentence and not a traceback."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    try:
        from ._commands import run
    except ImportError as error:
        print(f'fewstep: {error}; install with: pip install "fewstep[cli]"', file=sys.stderr)
        raise SystemExit(2) from None
    run()
