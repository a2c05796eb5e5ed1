"""Random programs with attention in them, drawn by Hypothesis as text, and a judge: eager in float64."""
