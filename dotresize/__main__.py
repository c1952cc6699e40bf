import sys

from dotresize.cli import main

sys.exit(main())
