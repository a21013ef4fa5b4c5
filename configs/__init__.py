"""Configuration: the Hydra groups (YAML) and the check that the installed packages belong together (stack.py)."""
