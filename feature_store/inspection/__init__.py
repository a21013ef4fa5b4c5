"""Looks at a whole store: figures about it, and whether its bytes are as written."""
