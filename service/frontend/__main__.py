"""``python -m service.frontend``: what the engine starts for ``--frontends``; nobody else does."""

import sys

from service.frontend.process import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
