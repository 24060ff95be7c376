"""Recipes: each module has a function `get_config`, which returns the settings of a run.

In a checkout the package is `configs`. In an installed package it is `pg_ground.configs`.
"""
