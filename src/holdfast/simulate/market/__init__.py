"""One machine or a rigid gang: market policies on many windows of a trace at once, compared, bounded and told."""
