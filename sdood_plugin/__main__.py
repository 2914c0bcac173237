"""`python -m sdood_plugin` is `sdood`."""

import sys

from .cli import main

sys.exit(main())
