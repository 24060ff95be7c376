"""The parts of `pg_ground.rehearse`: data and models in miniature, the steps, and the costs."""
