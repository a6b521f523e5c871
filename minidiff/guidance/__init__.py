"""Layouts, objectives on attention maps, guidance by their gradients, and gradient-free attention edits."""
