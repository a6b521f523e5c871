"""python -m minidiff."""

import sys

from .cli.main import main

sys.exit(main())
