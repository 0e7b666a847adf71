"""Runners, one module each; `engine.runner` defines their interface."""
