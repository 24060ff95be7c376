"""Evaluation: answers questions, scores rows of answers, and computes metrics from rows.

Scores and metrics are float64 numpy on the host. They depend on `predictions.jsonl` alone.
"""
