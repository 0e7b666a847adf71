"""An output that is an adapter: which formulas can be one, what it consists of, and its plan."""
