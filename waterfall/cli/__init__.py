"""The `waterfall` command."""
