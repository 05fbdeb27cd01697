"""The parts of ``training.pretrain``: from images with masks to trained projectors."""
