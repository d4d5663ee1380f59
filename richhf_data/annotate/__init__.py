"""The annotation server: collects rich, binary and side-by-side feedback from people in their browsers."""
