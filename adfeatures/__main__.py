"""``python -m adfeatures`` is the ``adfeatures`` command."""

import sys

from .cli import main

sys.exit(main())
