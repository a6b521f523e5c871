"""The networks of Stable Diffusion 1.x, one per file.

They need nothing but torch (and transformers for the text encoder).
"""
