"""The scale search: `settings` (how to search), `grid` (candidates), `stages` (step by step), `search` (for users)."""
