"""How the head of the embedded default is trained."""
