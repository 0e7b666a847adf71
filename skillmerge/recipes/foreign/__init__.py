"""Input from other tools: spellings, recipes and configurations."""
