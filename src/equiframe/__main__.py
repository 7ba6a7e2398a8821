import sys

from equiframe.cli import main

sys.exit(main())
