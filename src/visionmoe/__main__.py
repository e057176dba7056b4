import sys

from visionmoe.cli import main

sys.exit(main())
