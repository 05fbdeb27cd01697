"""The parts of ``training.evaluate``: from a model and a data set to tables and pictures."""
