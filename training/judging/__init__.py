"""How the embedded default is judged: on photographs of free packages and on rendered parts, with drawn defects."""
