"""`python -m rrvideo` is the `rrvideo` command."""

import sys

from rrvideo.cli import main

sys.exit(main())
