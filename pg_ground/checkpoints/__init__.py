"""Reading and writing weights and runs."""
