"""`python -m blip3o_dit`: the command blip3o-dit."""

import sys

from blip3o_dit.cli.main import main

sys.exit(main())
