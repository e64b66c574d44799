"""The command line: `divault serve | demo | publish | seal | open | call | verify | doctor | keys | config`.

For other programs `divault sign-in` and `sign-out`, for development `divault lighthouse`.
"""

from __future__ import annotations

import sys

from divault.cli.commands import app_for
from divault.cli.console import fail
from divault.errors import DivaultError, SettingsInvalid

__all__ = ["app_for", "main"]


def main() -> None:
    """Run the command line. Exit status: 0 done, 1 a typed error (its code is printed), 2 wrong usage."""
    try:
        app_for(sys.argv[1:])()
    except DivaultError as err:
        fail(err)
        sys.exit(1)
    except OSError as err:
        if err.filename is None or err.strerror is None:
            raise
        fail(SettingsInvalid(f"{err.filename} can't be used: {err.strerror}"))
        sys.exit(1)
