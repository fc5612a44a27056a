"""This package within others; each file imports the one it is named after when it is asked to."""
