"""Rows of answers → measures. Everything here is numpy on the host, in float64: `predictions.jsonl` is all that measures see."""
