"""What makes networks fast: packed layers, memory formats, compilers. Imported by `weights`, `run` and `cli` only."""
