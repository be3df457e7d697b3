"""The planner against simulated ranks over an unreliable network."""
