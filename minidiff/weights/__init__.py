"""Weight files: their kinds, the names of their keys, and strict loading."""
