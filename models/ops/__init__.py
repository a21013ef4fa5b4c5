"""One folder per op: reference.py defines it, torch_*.py is its fast form on any device, __init__ the public call."""
