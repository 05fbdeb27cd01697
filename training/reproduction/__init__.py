"""What ``training.reproduce`` is made of: the plan, the tables beside the published ones, and a rehearsal."""
