"""Scripts that rebuild what the package carries: the weights of the embedded default, and the sample images."""
