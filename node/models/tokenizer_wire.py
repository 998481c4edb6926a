"""The signals by which the kernel ends a tokenizer process, for `tokenizer_process` and `tokenizer_worker`."""

import signal
from typing import Final

OUT_OF_CPU: Final = signal.SIGPROF
"""The request took too much processor time."""

OUT_OF_TIME: Final = signal.SIGALRM
"""The request took too long by the clock."""
