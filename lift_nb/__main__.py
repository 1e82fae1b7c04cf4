"`python -m lift_nb`: the command line"
import sys

from lift_nb.cli import main

sys.exit(main())
