"""What every room uses: files and digests, trees, images, tables, progress."""
