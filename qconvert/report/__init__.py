"""The ways to show a Report or a Plan: tables for people, Markdown for the model's page, JSON for programs."""
