"""``python -m gankern``: the command line."""

from gankern.cli import main

main()
