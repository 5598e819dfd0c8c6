"""The whole story of a command, from its recipe to the published folder. Nothing heavy is imported with the package."""
