"""Rewards on token ids and on text, and the parsers of answers."""
