"""Images with captions: tar shards, lists of lines, folders."""
