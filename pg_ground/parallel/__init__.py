"""Devices and processes: sharding, multi-process runs, the memory model."""
