"""Drawn scenes of a few shapes, with captions: compositions that need no files."""
