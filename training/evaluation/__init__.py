"""What ``training.evaluate`` is made of: from a model and a data set to tables and pictures."""
