"""The study that this project began with, done again: its grid, its figures and its page."""
