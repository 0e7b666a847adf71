"""Text -> recipe: YAML, schema, expressions, schedules, gates, and what lint says of them."""
