"""Metrics, pictures and pages that people read."""
