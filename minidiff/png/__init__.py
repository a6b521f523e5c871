"""Generation parameters in picture files: reading and writing A1111's text and our own chunk."""
