"""``python -m flowdistill``: the same as the command ``flowdistill``."""

from flowdistill.cli import main

if __name__ == "__main__":
    main()
