"""``python -m moshi_ttt`` is the command ``moshi-ttt``: what torchrun can start."""

from moshi_ttt.apps.cli import main

if __name__ == "__main__":
    main()
