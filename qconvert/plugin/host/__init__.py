"""The host of plugins: it finds them, calls them, and holds what they return to their contract."""
