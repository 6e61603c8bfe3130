import sys

from benchmarks.dials.parent import main

sys.exit(main())
