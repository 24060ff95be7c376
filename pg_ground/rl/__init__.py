"""Reinforcement learning: rollout, advantages, objectives, loss and update.

Models and data are arguments. This package never imports them.
"""
