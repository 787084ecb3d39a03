"""``python -m service`` is the same program as the console script ``kiln``."""

from service.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
