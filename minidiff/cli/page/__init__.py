"""The browser page: `minidiff page` (extra `[page]`). Only app.py imports gradio."""
