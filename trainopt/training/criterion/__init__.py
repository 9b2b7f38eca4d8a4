"""The loss of a run: what it is under its wrappers, what it owns, and what it counts."""
