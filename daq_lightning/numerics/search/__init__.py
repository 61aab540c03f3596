"""The scale search: `settings` (how), `grid` (candidates), `stages` (step by step), `search` (for users)."""
