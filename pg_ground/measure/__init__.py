"""What answers are worth, on the host: published protocols over plain rows, with no model in sight."""
