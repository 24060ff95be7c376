"""Rewards on token ids and on text."""
