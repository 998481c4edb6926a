"""What holds for all tests."""

import os

# Daemons of tests that run at the same time, and the user's own node, must not find each other.
os.environ["METASWARM_NO_MDNS"] = "1"
