"""Experiments of the paper at a small size: the runs, how to start them, and their results."""
