"""`python -m visionmoe`."""

import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` says what it does: no traceback of an import
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # which `launch` blocks

from visionmoe.cli import main  # noqa: E402

sys.exit(main())
