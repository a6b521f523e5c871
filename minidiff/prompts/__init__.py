"""Prompts with marks: a text as weighted pieces, pieces as chunks of tokens, chunks as a context."""
