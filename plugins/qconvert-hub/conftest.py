"""Lets the tests run without installing the distribution: pytest puts this folder on sys.path."""
