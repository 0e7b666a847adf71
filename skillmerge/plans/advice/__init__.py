"""Advice about models that do not fit together, and about rules that leave out much of the skill."""
