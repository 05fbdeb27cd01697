"""The parts of ``training.publish``: from a trained projector to a repository of the Hub."""
