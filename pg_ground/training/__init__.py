"""Stages, their programs, and what a run does around them."""
