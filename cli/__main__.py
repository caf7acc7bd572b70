"""``python -m cli`` is ``psd``."""

from cli.main import main

main()
