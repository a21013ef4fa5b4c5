"""What several test files use: real processes, real stores, and synthetic events small enough for two cores."""
