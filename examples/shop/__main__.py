"""Run the shop: `python -m examples.shop`."""

import sys

from .app import main

sys.exit(main())
