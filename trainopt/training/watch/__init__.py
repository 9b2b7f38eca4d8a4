"""Follows a run, says what is wrong with it, and finds what makes a number that is not finite."""

from trainopt.training.watch.watch import Watch

__all__ = ["Watch"]
