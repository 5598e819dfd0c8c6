"""What qconvert does with plugins: finds them, calls them, and holds what they return to their contract."""
