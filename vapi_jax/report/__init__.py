"""What a person looks at: figures, the page, the verdict in words."""
