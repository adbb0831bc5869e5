"""Clinically weighted preference alignment of medical vision-language models on Ray."""

import os

__version__ = "0.1.0"

# Arrow's own allocator keeps a heap for each of its threads: a worker that has merged tables would hold 80
# MiB, where it needs 10. Arrow reads this when it is imported.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
