"""`python -m skillmerge` is the command line."""

from skillmerge.cli.main import main

main()
