"""What people bring from other tools: spellings, and recipes and configurations of theirs."""
