"""`python -m foveate`."""

from .cli import main

main()
