"""Layouts, objectives of the attention, guidance by their gradient, and edits without one."""
