"""The networks of Stable Diffusion 1.x, one a file.

They need nothing but torch (and transformers for the text encoder).
"""
