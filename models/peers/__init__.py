"""Other sequence models under the tower's interface, to compare with."""
