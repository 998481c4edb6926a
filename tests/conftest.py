"""What holds for all tests."""

import os
import signal

# Daemons of tests that run at the same time, and the user's own node, must not find each other.
os.environ["METASWARM_NO_MDNS"] = "1"

# Started in the background by a shell, tests ignore Ctrl-C, and so would the programs that they start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
