"""Weight files: what they hold, how their keys are named, and loading them strictly."""
