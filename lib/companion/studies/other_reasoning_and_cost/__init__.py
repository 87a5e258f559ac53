"""09: other reasoning, other prompts, and what back attention costs."""
