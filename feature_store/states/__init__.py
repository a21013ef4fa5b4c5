"""User states beside a store: files, what is new since them, late events."""
