"""How a Report or a Plan is shown: tables for people, Markdown for the model's page, JSON for programs."""
