"""Ahead-of-time compilation for TPU slices, and the analysis of compiled programs."""
