"""What `tokenizer_process` and `tokenizer_worker` agree upon."""

import signal
import struct
from typing import Final

PREFIX: Final = struct.Struct(">I")
"""The length of a frame, before it."""

OUT_OF_CPU: Final = signal.SIGPROF
"""What ends a process whose request took too much time of the processor."""

OUT_OF_TIME: Final = signal.SIGALRM
"""What ends a process whose request took too long by the clock."""
