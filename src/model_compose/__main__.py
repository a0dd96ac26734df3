"""`python -m model_compose`."""

from model_compose.cli import main

main()
