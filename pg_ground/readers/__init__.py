"""Readers of the text of an answer: words, numbers, options, boxes and points.

Rewards read the answers of the policy, benchmarks read the answers of any model, and `data` reads
ground truth that is written as an answer.
"""
