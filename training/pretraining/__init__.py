"""What ``training.pretrain`` is made of: from images with masks to trained projectors."""
