"""The ELASTIC tower: the paper's bidirectional form, and the causal form with user states."""
