"""The verbs, one module each: functions that the command line and Python share."""
