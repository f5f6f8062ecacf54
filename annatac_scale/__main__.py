"""``python -m annatac_scale`` is the command ``annatac``."""

from annatac_scale.cli import main

if __name__ == "__main__":
    main()
