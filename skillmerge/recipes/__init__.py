"""Text -> recipe: YAML, schema, expressions, schedules, gates, lint."""
