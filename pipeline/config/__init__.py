"""The configuration of every verb as dataclasses, and the reference page made from them."""
