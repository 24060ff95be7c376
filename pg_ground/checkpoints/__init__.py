"""Reads and writes weights, and the checkpoints of runs."""
