"""Reinforcement:

rollout, rewards, advantages, loss, update. Models and data are handed in, never imported.
"""
