"""What makes networks fast: packed layers, memory formats, compilers. Only `weights` and `generate` know this room."""
