"""The verbs a user types, and the modules they are made of. The only room that knows all the others."""

import os

from elastic_rec.configs.stack import check_versions

# Arrow's allocator keeps what is freed, as glibc is told to (allocator.py): otherwise a reader of row groups faults its
# pages in again and again. Arrow looks at it when it is loaded, so before anything else.
os.environ.setdefault("MIMALLOC_PURGE_DELAY", "-1")

check_versions()
