"""The one error of this room: the data, not the program, is at fault."""

DAMAGED = "the file was changed or damaged after it was written: restore it, or run the ingest again"


class DataError(Exception):
    """Bad input events or a bad history store. The message says what is wrong, where, and what to do about it."""
