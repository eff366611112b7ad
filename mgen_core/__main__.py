"""`python -m mgen_core`: the same as `mgen`."""

from .cli import main

main()
