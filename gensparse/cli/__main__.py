"""`python -m gensparse.cli`."""

from gensparse.cli import main

main()
