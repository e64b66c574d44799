"""`python -m divault` is the command `divault`."""

from divault.cli import main

main()
